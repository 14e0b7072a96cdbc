// Which instruction set a kernel runs with, asked once per call.
//
// A kernel is written once, as plain loops in an always-inlined function, and compiled for each
// level by a function that carries a target attribute and does nothing but call it:
//
//   NABLA_FAST_INLINE void kernel(const float* x) {...}
//   void kernel_baseline(const float* x) { kernel(x); }
//   NABLA_FAST_TARGET_AVX2 void kernel_avx2(const float* x) { kernel(x); }
//   NABLA_FAST_TARGET_AVX512 void kernel_avx512(const float* x) { kernel(x); }
//
//   select_isa(kernel_baseline, kernel_avx2, kernel_avx512)(x);
//
// Functions called in its hot loops must be NABLA_FAST_INLINE too: one that is not inlined, and any
// lambda, is compiled for the baseline alone.
#ifndef NABLA_FAST_CPU_BASE_ISA_H_
#define NABLA_FAST_CPU_BASE_ISA_H_

#include "nabla_fast.h"

#define NABLA_FAST_INLINE inline __attribute__((always_inline))

#if defined(__x86_64__) && defined(__GNUC__)
  #define NABLA_FAST_X86 1
  #define NABLA_FAST_TARGET_AVX2 __attribute__((target("avx2,fma,f16c,bmi,bmi2")))
  #define NABLA_FAST_TARGET_AVX512 \
    __attribute__((target("avx512f,avx512bw,avx512cd,avx512dq,avx512vl,avx2,fma,f16c,bmi,bmi2")))
#else
  #define NABLA_FAST_X86 0
  #define NABLA_FAST_TARGET_AVX2
  #define NABLA_FAST_TARGET_AVX512
#endif

// Intel's matrix unit, whose use a process asks Linux for.
#if NABLA_FAST_X86 && defined(__linux__)
  #define NABLA_FAST_AMX 1
  #define NABLA_FAST_TARGET_AMX \
    __attribute__((target(      \
        "amx-tile,amx-bf16,avx512f,avx512bw,avx512cd,avx512dq,avx512vl,avx2,fma,f16c,bmi,bmi2")))
#else
  #define NABLA_FAST_AMX 0
#endif

namespace nabla_fast {

// The variant of a kernel for the level in force. Elsewhere than on x86-64 the three are the same.
template <typename Function>
Function* select_isa(Function* baseline, Function* avx2, Function* avx512) {
  switch (nabla_fast_cpu_isa()) {
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

}  // namespace nabla_fast

#endif  // NABLA_FAST_CPU_BASE_ISA_H_
