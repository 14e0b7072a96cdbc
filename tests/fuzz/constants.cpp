#include "fuzz.h"

namespace fuzz {

FUZZ(status_string) {
  const nabla_fast_status status = random.one_in(2)
                                       ? static_cast<nabla_fast_status>(random.next())
                                       : static_cast<nabla_fast_status>(random.between(-5, 40));
  const char* line = nabla_fast_status_string(status);
  check(line && *line && !std::strchr(line, '\n'), "a status has no line");
  check(nabla_fast_abi_version() == NABLA_FAST_ABI_VERSION, "the ABI version");
}

FUZZ(limit_cpu_isa) {
  // What it takes would change the level under the other threads' cases.
  const nabla_fast_isa before = nabla_fast_cpu_isa();
  const nabla_fast_isa wrong = random.pick<nabla_fast_isa>({-1, 100, INT32_MAX, INT32_MIN});
  check(nabla_fast_limit_cpu_isa(wrong) == NABLA_FAST_UNKNOWN_ISA, "an unknown level is accepted");
  check(nabla_fast_cpu_isa() == before, "a refused level has changed the level");
}

}  // namespace fuzz
