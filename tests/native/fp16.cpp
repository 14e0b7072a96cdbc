// fp16 LEVEL: all fp16 numbers as fp32, in the order of their bits, to standard output. Exit status
// 77: the CPU has no such level.

#include "simd/fp16.h"

#include <cstdint>
#include <cstdio>
#include <cstdlib>

#include "base/isa.h"

namespace nabla_fast {
namespace {

constexpr int kNumbers = 1 << 16;

template <int W>
NABLA_FAST_INLINE void widen_kernel(const Fp16* from, float* to) {
  for (int n = 0; n < kNumbers; n += W) store<W>(to + n, load_fp32<W>(from + n));
}

NABLA_FAST_FOR_EACH_ISA(widen, widen_kernel<W>)

Fp16 numbers[kNumbers];
float widened[kNumbers];

}  // namespace
}  // namespace nabla_fast

using namespace nabla_fast;

int main(int, char** argv) {
  const auto level = static_cast<nabla_fast_isa>(std::atoi(argv[1]));
  if (nabla_fast_limit_cpu_isa(level) != NABLA_FAST_OK || nabla_fast_cpu_isa() != level) return 77;
  for (int n = 0; n < kNumbers; ++n) numbers[n].bits = static_cast<uint16_t>(n);
  widen(numbers, widened);
  return std::fwrite(widened, sizeof widened, 1, stdout) == 1 ? 0 : 1;
}
