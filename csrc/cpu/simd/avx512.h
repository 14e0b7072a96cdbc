// Operations of AVX-512 that gcc's vectors lack, on 16 floats. gcc splits a mask that several
// selections share into its lanes, unless the mask is a number.
#ifndef NABLA_FAST_CPU_SIMD_AVX512_H_
#define NABLA_FAST_CPU_SIMD_AVX512_H_

#include <cstdint>

#include "base/isa.h"

#if NABLA_FAST_EMULATED && !NABLA_FAST_AVX512
  #define NABLA_FAST_AVX512_BUILTINS 1
  #include "emulation/avx512.h"
#elif NABLA_FAST_AVX512 && !defined(__clang__)
  #define NABLA_FAST_AVX512_BUILTINS 1
  #include <immintrin.h>

namespace nabla_fast::avx512 {

typedef float Floats __attribute__((vector_size(64)));
typedef int32_t Ints __attribute__((vector_size(64)));

// !(x <= y).
NABLA_FAST_INLINE uint16_t above(Floats x, Floats y) {
  return __builtin_ia32_cmpps512_mask(x, y, 6, -1, 4);
}
NABLA_FAST_INLINE uint16_t at_least(Floats x, Floats y) {
  return __builtin_ia32_cmpps512_mask(x, y, 13, -1, 4);
}
NABLA_FAST_INLINE Floats select(uint16_t mask, Floats yes, Floats no) {
  return __builtin_ia32_blendmps_512_mask(no, yes, mask);
}
// x 2^n where the mask holds, 0 where it does not.
NABLA_FAST_INLINE Floats scaled(uint16_t mask, Floats x, Floats n) {
  return __builtin_ia32_scalefps512_mask(x, n, Floats{}, mask, 4);
}
// Numbers of a table of 32, by the lowest five bits.
NABLA_FAST_INLINE Floats looked_up(Ints index, Floats lower, Floats upper) {
  return __builtin_ia32_vpermt2varps512_mask(index, lower, upper, -1);
}
// 1 / sqrt(x) and 1 / x within 2^-14, relatively, for normal numbers.
NABLA_FAST_INLINE Floats rsqrt14(Floats x) { return __builtin_ia32_rsqrt14ps512_mask(x, x, -1); }
NABLA_FAST_INLINE Floats rcp14(Floats x) { return __builtin_ia32_rcp14ps512_mask(x, x, -1); }

}  // namespace nabla_fast::avx512

#else
  #define NABLA_FAST_AVX512_BUILTINS 0
#endif

#endif  // NABLA_FAST_CPU_SIMD_AVX512_H_
