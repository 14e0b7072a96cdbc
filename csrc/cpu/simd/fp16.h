// fp16 (IEEE binary16) as fp32, exactly: numbers below 2^-14, infinities and NaN too.
#ifndef NABLA_FAST_CPU_SIMD_FP16_H_
#define NABLA_FAST_CPU_SIMD_FP16_H_

#include <cstdint>
#include <cstring>

#include "base/isa.h"
#include "simd/lanes.h"
#include "simd/vec.h"

namespace nabla_fast {

// A type of its own: uint16_t is a bf16.
struct Fp16 {
  uint16_t bits;
};

// fp16 in the lower halves of words. Numbers below 2^-14 are counted in steps of 2^-24: as bits of a
// float they would be lost where the thread flushes such floats to zero.
template <int W>
NABLA_FAST_INLINE Floats<W> fp16_words_to_fp32(typename VecTypes<W>::Bits words) {
  using Bits = typename VecTypes<W>::Bits;
  const Bits exponent = words & 0x7C00u, sign = (words & 0x8000u) << 16;
  const Bits rebiased = ((words & 0x7FFFu) << 13) + (112u << 23);
  const Bits special = ((words & 0x3FFu) << 13) | 0x7F800000u;
  const Floats<W> small = __builtin_convertvector((Ints<W>)(words & 0x3FFu), Floats<W>) * 0x1p-24f;
  const Bits magnitude = exponent == 0 ? (Bits)small : exponent == 0x7C00u ? special : rebiased;
  return (Floats<W>)(magnitude | sign);
}

// W elements from anywhere in an array, W that of the instruction set in use.
template <int W>
NABLA_FAST_INLINE Floats<W> load_fp32(const Fp16* x) {
  typedef uint16_t Halves __attribute__((vector_size(2 * W), aligned(2), may_alias));
  const Halves& halves = *reinterpret_cast<const Halves*>(x);
#if NABLA_FAST_AVX2
  Floats<W> floats;
  if constexpr (W == 16 && NABLA_FAST_AVX512) {
    asm("vcvtph2ps %1, %0" : "=v"(floats) : "m"(halves));
    return floats;
  }
  if constexpr (W == 8) {
    asm("vcvtph2ps %1, %0" : "=x"(floats) : "m"(halves));
    return floats;
  }
#endif
  return fp16_words_to_fp32<W>(__builtin_convertvector(halves, typename VecTypes<W>::Bits));
}

NABLA_FAST_INLINE Lanes load(const Fp16* x) {
  typedef uint16_t Halves __attribute__((vector_size(2 * kLanes)));
  Halves halves;
  std::memcpy(&halves, x, sizeof halves);
  return fp16_words_to_fp32<kLanes>(__builtin_convertvector(halves, VecTypes<kLanes>::Bits));
}

}  // namespace nabla_fast

#endif  // NABLA_FAST_CPU_SIMD_FP16_H_
