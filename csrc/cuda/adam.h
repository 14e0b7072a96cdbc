// Adam's step on an element, and what its steps share.
#ifndef NABLA_FAST_CUDA_ADAM_H_
#define NABLA_FAST_CUDA_ADAM_H_

#include "device.h"

namespace nabla_fast::cuda {

constexpr double kBeta1 = 0.9, kBeta2 = 0.999;
// Their logarithms.
constexpr double kLogBeta1 = -0.10536051565782628, kLogBeta2 = -0.0010005003335835344;
constexpr float kEpsilon = 1e-8f;

struct AdamRate {
  float rate;   // learning rate / (1 - beta1^count)
  float scale;  // 1 / sqrt(1 - beta2^count)
};

// Rate of the step number `count`, from 1 on.
NABLA_FAST_DEVICE AdamRate adam_rate(double learning_rate, double count) {
  return {static_cast<float>(learning_rate / -expm1(count * kLogBeta1)),
          static_cast<float>(1 / sqrt(-expm1(count * kLogBeta2)))};
}

// Kingma & Ba's step of `x` along a gradient. The root and the quotient are the device's approximations,
// within 2 ulp each.
NABLA_FAST_DEVICE void adam_step(float gradient, AdamRate step, float& x, float& exp_avg,
                                 float& exp_avg_sq) {
  const float share1 = static_cast<float>(1 - kBeta1), share2 = static_cast<float>(1 - kBeta2);
  exp_avg = fmaf(gradient - exp_avg, share1, exp_avg);
  exp_avg_sq = fmaf(share2 * gradient, gradient, exp_avg_sq * static_cast<float>(kBeta2));
  const float divisor = fmaf(sqrt_approx(exp_avg_sq), step.scale, kEpsilon);
  x = fmaf(-step.rate, divide_approx(exp_avg, divisor), x);
}

}  // namespace nabla_fast::cuda

#endif  // NABLA_FAST_CUDA_ADAM_H_
