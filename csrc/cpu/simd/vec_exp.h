// exp for float32, written without branches so that the loop around it vectorizes.
#ifndef NABLA_FAST_CPU_SIMD_VEC_EXP_H_
#define NABLA_FAST_CPU_SIMD_VEC_EXP_H_

#include <cstdint>
#include <cstring>

#include "base/isa.h"

namespace nabla_fast {

NABLA_FAST_INLINE int32_t float_bits(float x) {
  int32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  return bits;
}

NABLA_FAST_INLINE float bits_float(int32_t bits) {
  float x;
  std::memcpy(&x, &bits, sizeof x);
  return x;
}

// exp(x) = 2^exponent * mantissa with mantissa in [0.7, 1.42]; |x| at most 1000.
struct ExpParts {
  float mantissa;
  int32_t exponent;
};

NABLA_FAST_INLINE ExpParts exp_parts(float x) {
  // Adding 1.5 * 2^23 rounds to an integer, which then stands in the low bits of the sum.
  const float round = 12582912.0f;
  const float shifted = x * 1.44269504f + round;
  const float n = shifted - round;
  // log(2) in two parts; the upper has 10 bits, so that its product with n is exact without FMA
  // too.
  const float r = (x - n * 0.693359375f) - n * -2.12194440e-4f;
  // Minimax for (exp(r) - 1 - r) / r^2 on |r| <= log(2) / 2: 2^-28 relative to exp(r).
  float q = 1.38145383e-3f;
  q = q * r + 8.36874545e-3f;
  q = q * r + 4.16683890e-2f;
  q = q * r + 1.66665211e-1f;
  q = q * r + 4.99999940e-1f;
  return {1.0f + (r + (r * r) * q), float_bits(shifted) - float_bits(round)};
}

// exp(x), within 2 ulp for every x, results below 2^-126 (rounded to the subnormal grid) included;
// 0 for -inf, inf from 88.73 on, NaN for NaN.
NABLA_FAST_INLINE float vec_exp(float x) {
  // NaN becomes -104 here, and NaN again at the end.
  const float low = x > -104.0f ? x : -104.0f;
  const float bounded = low > 89.0f ? 89.0f : low;
  const ExpParts parts = exp_parts(bounded);
  // Two powers of two: one alone would leave the exponents of normal numbers at either end.
  const int32_t over = parts.exponent > 126 ? 126 : parts.exponent;
  const int32_t first = over < -100 ? -100 : over;
  const int32_t second = parts.exponent - first;
  const float y = bits_float(float_bits(parts.mantissa) + first * (1 << 23)) *
                  bits_float((second + 127) * (1 << 23));
  return x != x ? x : y;
}

// exp(x) for x in [-87, 88], within 2 ulp; anything elsewhere.
NABLA_FAST_INLINE float vec_exp_normal(float x) {
  const ExpParts parts = exp_parts(x);
  return bits_float(float_bits(parts.mantissa) + parts.exponent * (1 << 23));
}

}  // namespace nabla_fast

#endif  // NABLA_FAST_CPU_SIMD_VEC_EXP_H_
