// bf16 and fp32: the upper half of an fp32 number is a bf16.
#ifndef NABLA_FAST_CPU_SIMD_BF16_H_
#define NABLA_FAST_CPU_SIMD_BF16_H_

#include <cstdint>
#include <cstring>

#include "base/isa.h"
#include "simd/vec.h"

namespace nabla_fast {

constexpr uint16_t kBf16NaN = 0x7FC0, kBf16MinusInfinity = 0xFF80;

inline float bf16_to_fp32(uint16_t bf16) {
  const uint32_t bits = static_cast<uint32_t>(bf16) << 16;
  float x;
  std::memcpy(&x, &bits, sizeof x);
  return x;
}

// Rounds to nearest, ties to even.
NABLA_FAST_INLINE uint16_t fp32_to_bf16(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  if (x != x) return static_cast<uint16_t>(bits >> 16 | 0x40);
  return static_cast<uint16_t>((bits + 0x7FFF + (bits >> 16 & 1)) >> 16);
}

// The same of numbers that are not NaN, as fp32.
template <int W>
NABLA_FAST_INLINE Floats<W> rounded_to_bf16(Floats<W> x) {
  using Bits = typename VecTypes<W>::Bits;
  const Bits bits = (Bits)x;
  return (Floats<W>)((bits + 0x7FFF + (bits >> 16 & 1)) & 0xFFFF0000u);
}

// An element of float or, as uint16_t, of bf16.
NABLA_FAST_INLINE float to_fp32(float x) { return x; }
NABLA_FAST_INLINE float to_fp32(uint16_t bf16) { return bf16_to_fp32(bf16); }

// Pairs of bf16 in words, as fp32: those in the lower halves and those in the upper ones.
template <int W>
NABLA_FAST_INLINE Floats<W> lower_to_fp32(typename VecTypes<W>::Bits words) {
  return (Floats<W>)(words << 16);
}
template <int W>
NABLA_FAST_INLINE Floats<W> upper_to_fp32(typename VecTypes<W>::Bits words) {
  return (Floats<W>)(words & 0xFFFF0000u);
}

// W elements from anywhere in an array, W that of the instruction set in use.
template <int W>
NABLA_FAST_INLINE Floats<W> load_fp32(const float* x) {
  return load<W>(x);
}
template <int W>
NABLA_FAST_INLINE Floats<W> load_fp32(const uint16_t* bf16) {
  typedef uint16_t Halves __attribute__((vector_size(2 * W), aligned(2), may_alias));
  const Halves& halves = *reinterpret_cast<const Halves*>(bf16);
  // gcc would widen both halves of the vector, and join them.
#if NABLA_FAST_AVX2
  typename VecTypes<W>::Bits words;
  if constexpr (W == 16 && NABLA_FAST_AVX512) {
    asm("vpmovzxwd %1, %0" : "=v"(words) : "m"(halves));
    return lower_to_fp32<W>(words);
  }
  if constexpr (W == 8) {
    asm("vpmovzxwd %1, %0" : "=x"(words) : "m"(halves));
    return lower_to_fp32<W>(words);
  }
#endif
  return lower_to_fp32<W>(__builtin_convertvector(halves, typename VecTypes<W>::Bits));
}

// to[k] = from[k] for k < count, and zeros up to the next multiple of 16.
template <int W, typename T>
NABLA_FAST_INLINE void copy_to_fp32(const T* from, int64_t count, float* to) {
  int64_t k = 0;
  for (; k + 16 <= count; k += 16) {
#pragma GCC unroll 4
    for (int part = 0; part < 16; part += W) store<W>(to + k + part, load_fp32<W>(from + k + part));
  }
  if (k == count) return;
  T last[16] = {};
  std::memcpy(last, from + k, sizeof(T) * static_cast<size_t>(count - k));
#pragma GCC unroll 4
  for (int part = 0; part < 16; part += W) store<W>(to + k + part, load_fp32<W>(last + part));
}

}  // namespace nabla_fast

#endif  // NABLA_FAST_CPU_SIMD_BF16_H_
