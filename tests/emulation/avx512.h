// Operations of csrc/cpu/simd/avx512.h for CPUs without AVX-512, by lanes. Estimates have an error of
// up to 2^-14 as the instructions' do, but other bits.
#ifndef NABLA_FAST_TESTS_EMULATION_AVX512_H_
#define NABLA_FAST_TESTS_EMULATION_AVX512_H_

#include <cmath>
#include <cstdint>
#include <cstring>

#include "base/isa.h"

namespace nabla_fast::avx512 {

typedef float Floats __attribute__((vector_size(64)));
typedef int32_t Ints __attribute__((vector_size(64)));
constexpr int kFloats = 16;

NABLA_FAST_INLINE uint16_t above(Floats x, Floats y) {
  uint32_t mask = 0;
  for (int n = 0; n < kFloats; ++n) mask |= static_cast<uint32_t>(!(x[n] <= y[n])) << n;
  return static_cast<uint16_t>(mask);
}

NABLA_FAST_INLINE uint16_t at_least(Floats x, Floats y) {
  uint32_t mask = 0;
  for (int n = 0; n < kFloats; ++n) mask |= static_cast<uint32_t>(x[n] >= y[n]) << n;
  return static_cast<uint16_t>(mask);
}

NABLA_FAST_INLINE Floats select(uint16_t mask, Floats yes, Floats no) {
  Floats y = no;
  for (int n = 0; n < kFloats; ++n)
    if (mask >> n & 1) y[n] = yes[n];
  return y;
}

NABLA_FAST_INLINE Floats scaled(uint16_t mask, Floats x, Floats n) {
  Floats y = {};
  for (int lane = 0; lane < kFloats; ++lane) {
    if (!(mask >> lane & 1)) continue;
    const float exponent = std::fmin(std::fmax(std::floor(n[lane]), -600.0f), 600.0f);
    // A power of two, rounded once; fmin and fmax leave no NaN, which the sum brings back.
    uint64_t bits = static_cast<uint64_t>(1023 + static_cast<int>(exponent)) << 52;
    double power;
    std::memcpy(&power, &bits, sizeof power);
    y[lane] = n[lane] == n[lane] ? static_cast<float>(x[lane] * power) : n[lane];
  }
  return y;
}

NABLA_FAST_INLINE Floats looked_up(Ints index, Floats lower, Floats upper) {
  Floats y = {};
  for (int n = 0; n < kFloats; ++n)
    y[n] = index[n] & kFloats ? upper[index[n] % kFloats] : lower[index[n] % kFloats];
  return y;
}

// x with 14 bits behind the point: an error just below 2^-14, always to the same side.
inline float cut(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  if (x - x == 0) bits &= 0xFFFFFE00u;
  std::memcpy(&x, &bits, sizeof x);
  return x;
}

NABLA_FAST_INLINE Floats rsqrt14(Floats x) {
  Floats y = {};
  for (int n = 0; n < kFloats; ++n) y[n] = cut(1.0f / std::sqrt(x[n]));
  return y;
}

NABLA_FAST_INLINE Floats rcp14(Floats x) {
  Floats y = {};
  for (int n = 0; n < kFloats; ++n) y[n] = cut(1.0f / x[n]);
  return y;
}

}  // namespace nabla_fast::avx512

#endif  // NABLA_FAST_TESTS_EMULATION_AVX512_H_
