// Sums over the tokens of a row, from which its statistics follow.
#ifndef NABLA_FAST_CPU_SOFTMAX_TOKEN_SUMS_H_
#define NABLA_FAST_CPU_SOFTMAX_TOKEN_SUMS_H_

#include <cstdint>

#include "base/floats.h"
#include "softmax/row_softmax.h"
#include "softmax/tau.h"

namespace nabla_fast::softmax {

// Sums over the tokens of a segment or a row, with d_v = logits_v - max. Tokens at the maximum are
// counted apart: added to 1, a sum below 2^-24 would be lost, and with it the entropy of a peaked
// row.
struct TokenSums {
  float max = -kInfinity;
  bool nan = false;
  int64_t argmax = -1;
  double at_max = 0;     // how many tokens are at the maximum
  double sum_exp = 0;    // sum of exp(d_v / tau) over the others
  double sum_d_exp = 0;  // sum of d_v exp(d_v / tau)
};

// `sums` relative to a higher maximum, both finite.
inline TokenSums rescaled(const TokenSums& sums, float max, double tau) {
  const double gap = static_cast<double>(sums.max) - max;
  const double scale = rescale(sums.max, max, tau);
  const double total = sums.at_max + sums.sum_exp;
  TokenSums result = sums;
  result.max = max;
  result.at_max = 0;
  result.sum_exp = scale * total;
  result.sum_d_exp = scale * (sums.sum_d_exp + gap * total);
  return result;
}

// The sums of two neighbours; `right` holds the tokens with the higher indices.
inline TokenSums joined(const TokenSums& left, const TokenSums& right, double tau) {
  const float max = left.max < right.max ? right.max : left.max;
  if (left.nan || right.nan || max == kInfinity) {
    TokenSums result;
    result.max = max;
    result.nan = left.nan || right.nan;
    return result;
  }
  if (right.max == -kInfinity) return left;
  if (left.max == -kInfinity) return right;
  TokenSums result = left.max < right.max ? right : left;
  const TokenSums other = left.max < right.max   ? rescaled(left, right.max, tau)
                          : right.max < left.max ? rescaled(right, left.max, tau)
                                                 : right;
  result.at_max += other.at_max;
  result.sum_exp += other.sum_exp;
  result.sum_d_exp += other.sum_d_exp;
  return result;
}

}  // namespace nabla_fast::softmax

#endif  // NABLA_FAST_CPU_SOFTMAX_TOKEN_SUMS_H_
