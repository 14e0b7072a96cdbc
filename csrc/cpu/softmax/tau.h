// The temperature of a softmax.
#ifndef NABLA_FAST_CPU_SOFTMAX_TAU_H_
#define NABLA_FAST_CPU_SOFTMAX_TAU_H_

#include "base/floats.h"

namespace nabla_fast::softmax {

// exp(d / tau) is vec_exp2() of d, inverse_high and inverse_low.
struct Tau {
  explicit Tau(double tau)
      : value(tau),
        inverse_high(static_cast<float>(kLog2E / tau)),
        inverse_low(static_cast<float>(kLog2E / tau - inverse_high)),
        lowest(static_cast<float>(kMinExponent * tau)) {}
  static constexpr double kLog2E = 1.4426950408889634;
  double value;
  // log2(e) / tau in two parts: the rounding of one float would be the same for all tokens, and
  // not average out over them.
  float inverse_high;
  float inverse_low;
  // Tokens whose logit lies this far below the maximum are left out: exp(-87) < 2^-125.
  float lowest;
};

}  // namespace nabla_fast::softmax

#endif  // NABLA_FAST_CPU_SOFTMAX_TAU_H_
