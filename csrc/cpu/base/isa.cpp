#include "base/isa.h"

#include <atomic>

#if NABLA_FAST_AMX && !NABLA_FAST_EMULATED
  #include <sys/syscall.h>
  #include <unistd.h>
#endif

namespace {

// Asks the system, too, for the matrix unit.
bool has_amx() {
#if NABLA_FAST_AMX && !NABLA_FAST_EMULATED
  constexpr int kRequestPermission = 0x1023, kTileData = 18;  // of arch_prctl(2)
  return __builtin_cpu_supports("amx-tile") && __builtin_cpu_supports("amx-bf16") &&
         syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
#else
  return false;
#endif
}

// The compiler's run-time check asks both the CPU and whether the system saves its registers.
nabla_fast_isa best_isa_of_cpu() {
#if NABLA_FAST_X86
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
                    __builtin_cpu_supports("bmi") && __builtin_cpu_supports("bmi2");
  const bool avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512cd") && __builtin_cpu_supports("avx512dq") &&
                      __builtin_cpu_supports("avx512vl");
  if (avx2 && avx512 && has_amx()) return NABLA_FAST_ISA_AMX;
  // Intel's dot product of bf16 has half the rate of its float32 multiply-add: 63 against 131
  // GFLOP/s on a core of a Sapphire Rapids. It is not the best that such a CPU has.
  if (avx2 && avx512 && __builtin_cpu_supports("avx512bf16") && __builtin_cpu_is("amd"))
    return NABLA_FAST_ISA_AVX512_BF16;
  if (avx2 && avx512) return NABLA_FAST_ISA_AVX512;
  if (avx2) return NABLA_FAST_ISA_AVX2;
#endif
  return NABLA_FAST_ISA_BASELINE;
}

#if NABLA_FAST_EMULATED
// All levels, where the CPU has those that the build takes from it.
nabla_fast_isa best_isa() {
  const nabla_fast_isa best = best_isa_of_cpu();
  return best >= NABLA_FAST_EMULATED_FROM - 1 ? NABLA_FAST_ISA_AMX : best;
}
#else
nabla_fast_isa best_isa() { return best_isa_of_cpu(); }
#endif

std::atomic<nabla_fast_isa> limit{NABLA_FAST_ISA_AMX};

}  // namespace

nabla_fast_isa nabla_fast_cpu_isa(void) {
  static const nabla_fast_isa best = best_isa();
  const nabla_fast_isa most = limit.load(std::memory_order_relaxed);
  return best < most ? best : most;
}

nabla_fast_status nabla_fast_limit_cpu_isa(nabla_fast_isa isa) {
  if (isa < NABLA_FAST_ISA_BASELINE || isa > NABLA_FAST_ISA_AMX) return NABLA_FAST_UNKNOWN_ISA;
  limit.store(isa, std::memory_order_relaxed);
  return NABLA_FAST_OK;
}
