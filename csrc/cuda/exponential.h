// exp for float32 to the last bits, which the device's approximation loses far from 0, and powers of
// two that sums of exponentials are scaled by.
#ifndef NABLA_FAST_CUDA_EXPONENTIAL_H_
#define NABLA_FAST_CUDA_EXPONENTIAL_H_

#include "device.h"

namespace nabla_fast::cuda {

constexpr float kInfinity = __builtin_huge_valf();
constexpr float kNaN = __builtin_nanf("");

// 1 / tau in the forms that kernels compute with.
struct Temperature {
  double power;     // 1 / (tau ln 2)
  float high, low;  // the same as a float32, and what that leaves
  float lowest;     // difference of logits at which the power of two is 2^-127
  float inverse;    // 1 / tau

  explicit Temperature(double tau)
      : power(1 / (tau * 0.693147180559945309417)),
        high(static_cast<float>(power)),
        low(static_cast<float>(power - high)),
        lowest(static_cast<float>(-127 / power)),
        inverse(static_cast<float>(1 / tau)) {}
};

// exp(difference / tau) of a difference below 88 tau: exactly 1 at 0; 0 below 2^-126, for -inf and for
// NaN. Above it is any number.
//
// difference / (tau ln 2) is split into a whole number, which becomes the bits of an exponent, and a
// rest for the device's exp2.
NABLA_FAST_DEVICE float tempered_exp(float difference, const Temperature& tau) {
  const float bounded = fmaxf(difference, tau.lowest);
  // Adding 1.5 * 2^23 rounds to a whole number, which stands in the low bits of the sum; 127 is the
  // exponent's bias.
  const float kShift = 12583039.0f;
  const float shifted = fmaf(bounded, tau.high, kShift);
  const float rest = fmaf(bounded, tau.low, fmaf(bounded, tau.high, kShift - shifted));
  return exp2_approx(rest) * float_of(bits_of(shifted) << 23);
}

// 2^whole of whole numbers of at most 0; 0 below 2^-126. What is above 0, in a row that has met +inf,
// counts as 0.
NABLA_FAST_DEVICE float power_of_two(double whole) {
  const int bounded = static_cast<int>(fmin(fmax(whole, -127.0), 0.0));
  return float_of(static_cast<uint32_t>(bounded + 127) << 23);
}

// top / (tau ln 2) = whole + fraction, with -1 < fraction <= 0.
struct Power {
  double whole;
  float fraction;
};

// Of a row that has no finite logit: below any other, and a number.
constexpr double kNoPower = -1e300;

// `top`: the largest logit so far; one that is not finite counts as none.
NABLA_FAST_DEVICE Power power_of(float top, const Temperature& tau) {
  if (!(fabsf(top) < kInfinity)) return {kNoPower, 0};
  const double power = top * tau.power, whole = ceil(power);
  return {whole, static_cast<float>(power - whole)};
}

}  // namespace nabla_fast::cuda

#endif  // NABLA_FAST_CUDA_EXPONENTIAL_H_
