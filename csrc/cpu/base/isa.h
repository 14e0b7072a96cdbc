// Kernels compiled for each instruction set, of which a call runs one.
//
// A kernel is written once, as an always-inlined function of vectors of W floats or plain loops:
//
//   template <int W>
//   NABLA_FAST_INLINE float sum_kernel(const float* x, int64_t n) {...}
//   NABLA_FAST_FOR_EACH_ISA(sum, sum_kernel<W>)
//
//   sum(x, n);                            // at the level in force
//   auto* const sum_here = sum.select();  // the same, once for many calls
//
// The macro compiles it for the baseline (W = 4), AVX2 (8) and AVX-512 (16). gcc's target_clones
// would leave out W, and nabla_fast_limit_cpu_isa(), which changes the level between calls.
// Functions called in a kernel's hot loops must be NABLA_FAST_INLINE too: one that is not inlined,
// and any lambda, is compiled for the baseline alone.
//
// Kernels that must agree on W are selected for one level, which another thread may change
// meanwhile:
//
//   const nabla_fast_isa isa = nabla_fast_cpu_isa();
//   for (int64_t n = 0; n < units_of.select(isa)(); ++n) run_unit.select(isa)(n);
#ifndef NABLA_FAST_CPU_BASE_ISA_H_
#define NABLA_FAST_CPU_BASE_ISA_H_

#include "nabla_fast.h"

#define NABLA_FAST_INLINE inline __attribute__((always_inline))

#if defined(__x86_64__) && defined(__GNUC__)
  #define NABLA_FAST_X86 1
#else
  #define NABLA_FAST_X86 0
#endif

// A build for tests runs at every level on any CPU. The number is the first level that the CPU may
// lack, at most NABLA_FAST_ISA_AVX512_BF16: from it on kernels are compiled for the level below, and
// the bf16 units are functions (tests/emulation/).
#ifdef NABLA_FAST_EMULATED_FROM
  #define NABLA_FAST_EMULATED 1
#else
  #define NABLA_FAST_EMULATED 0
  #define NABLA_FAST_EMULATED_FROM 5
#endif

// Whether kernels of a width may name its registers and instructions.
#define NABLA_FAST_AVX2 (NABLA_FAST_X86 && NABLA_FAST_EMULATED_FROM > 1)
#define NABLA_FAST_AVX512 (NABLA_FAST_X86 && NABLA_FAST_EMULATED_FROM > 2)

#if NABLA_FAST_AVX2
  #define NABLA_FAST_TARGET_AVX2 __attribute__((target("avx2,fma,f16c,bmi,bmi2")))
#else
  #define NABLA_FAST_TARGET_AVX2
#endif
#if NABLA_FAST_AVX512
  #define NABLA_FAST_TARGET_AVX512 \
    __attribute__((target("avx512f,avx512bw,avx512cd,avx512dq,avx512vl,avx2,fma,f16c,bmi,bmi2")))
#else
  #define NABLA_FAST_TARGET_AVX512 NABLA_FAST_TARGET_AVX2
#endif

// Intel's matrix unit, whose use a process asks Linux for.
#if NABLA_FAST_EMULATED
  #define NABLA_FAST_AMX 1
  #define NABLA_FAST_TARGET_AMX NABLA_FAST_TARGET_AVX512
#elif NABLA_FAST_X86 && defined(__linux__)
  #define NABLA_FAST_AMX 1
  #define NABLA_FAST_TARGET_AMX \
    __attribute__((target(      \
        "amx-tile,amx-bf16,avx512f,avx512bw,avx512cd,avx512dq,avx512vl,avx2,fma,f16c,bmi,bmi2")))
#else
  #define NABLA_FAST_AMX 0
#endif

namespace nabla_fast {

// A kernel's variants, as the macro below makes them. Elsewhere than on x86-64 they differ in W
// alone, and the baseline runs.
template <typename Function>
struct IsaVariants;
template <typename Result, typename... Parameters>
struct IsaVariants<Result(Parameters...)> {
  Result (*baseline)(Parameters...);
  Result (*avx2)(Parameters...);
  Result (*avx512)(Parameters...);

  auto select(nabla_fast_isa isa = nabla_fast_cpu_isa()) const {
    switch (isa) {
      case NABLA_FAST_ISA_AMX:
      case NABLA_FAST_ISA_AVX512_BF16:
      case NABLA_FAST_ISA_AVX512:
        return avx512;
      case NABLA_FAST_ISA_AVX2:
        return avx2;
      default:
        return baseline;
    }
  }
  Result operator()(Parameters... x) const { return select()(x...); }
};

}  // namespace nabla_fast

// Defines NAME, the variants of a kernel given as an expression in W: sum_kernel<W>, or
// tile_kernel<W, float>.
#define NABLA_FAST_FOR_EACH_ISA(NAME, ...)                                                 \
  template <int W>                                                                         \
  using NAME##_function = decltype(__VA_ARGS__);                                           \
  template <typename Function>                                                             \
  struct NAME##_variants;                                                                  \
  template <typename Result, typename... Parameters>                                       \
  struct NAME##_variants<Result(Parameters...)> {                                          \
    static Result baseline(Parameters... x) {                                              \
      [[maybe_unused]] constexpr int W = 4;                                                \
      return __VA_ARGS__(x...);                                                            \
    }                                                                                      \
    NABLA_FAST_TARGET_AVX2 static Result avx2(Parameters... x) {                           \
      [[maybe_unused]] constexpr int W = 8;                                                \
      return __VA_ARGS__(x...);                                                            \
    }                                                                                      \
    NABLA_FAST_TARGET_AVX512 static Result avx512(Parameters... x) {                       \
      [[maybe_unused]] constexpr int W = 16;                                               \
      return __VA_ARGS__(x...);                                                            \
    }                                                                                      \
    static constexpr IsaVariants<Result(Parameters...)> kVariants{baseline, avx2, avx512}; \
  };                                                                                       \
  constexpr auto& NAME = NAME##_variants<NAME##_function<4>>::kVariants;

#endif  // NABLA_FAST_CPU_BASE_ISA_H_
