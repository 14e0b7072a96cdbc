// Softmax of rows whose logits come in parts (online softmax): the largest logit so far, and sums
// of exponentials relative to it, which are rescaled when it moves.
//
// A row is a RowSoftmax, or a lane of a LaneSoftmax where logits come by tiles [tokens, lanes].
// Other accumulators keep to the rule of row_status() and to rescale(), but add up in another
// order, or other terms, and their bits are promised:
//
//   TokenSums (token_sums.h)           tokens at the maximum apart, for the entropy of peaked rows
//   Tops, Sums (relaxed_tiles.h)       one chain of fp32 a tile: the exponentials are stored as weights
//   SegmentSums (latents pass)         exponentials times 2^24, down to the smallest of fp32
//   nll_grad                           sums in fp32, without the target's own term
//   prefix_attention                   sums in fp32, by tiles of keys
//   dto_descent                        relative to a number that stays while the maximum drifts
#ifndef NABLA_FAST_CPU_SOFTMAX_ROW_SOFTMAX_H_
#define NABLA_FAST_CPU_SOFTMAX_ROW_SOFTMAX_H_

#include <cmath>
#include <cstdint>

#include "base/floats.h"
#include "base/isa.h"
#include "gemm/vocab_tiles.h"
#include "nabla_fast.h"
#include "simd/vec.h"
#include "softmax/row_status.h"

namespace nabla_fast::softmax {

// Chains of a quarter of a tile, summed side by side.
constexpr int kSumChains = 4;

// Factor of sums relative to `low` that makes them relative to `high`: exp((low - high) / tau); 0
// where low is the maximum of no tokens.
inline double rescale(float low, float high, double tau = 1) {
  return std::exp((static_cast<double>(low) - high) / tau);
}

// A row's tokens so far.
struct RowSoftmax {
  float max = -kInfinity;
  double sum = 0;  // of exp(z - max)
  bool nan = false;

  // Adds tokens further to the right.
  void join(const RowSoftmax& right) {
    nan = nan || right.nan;
    if (right.max > max) {
      sum = sum * rescale(max, right.max) + right.sum;
      max = right.max;
    } else if (right.max > -kInfinity) {
      sum += right.sum * rescale(right.max, max);
    }
  }

  nabla_fast_status status() const { return row_status(max, nan); }

  // log sum_v exp(z_v) - shift
  double above(float shift) const { return (static_cast<double>(max) - shift) + std::log(sum); }
};

// RowSoftmax of a group of rows, by lanes.
struct LaneSoftmax {
  float max[gemm::kRowsPerGroup];
  int32_t nan[gemm::kRowsPerGroup];
  double sum[gemm::kRowsPerGroup];

  void clear(int lanes) {
    for (int lane = 0; lane < lanes; ++lane) {
      max[lane] = -kInfinity;
      nan[lane] = 0;
      sum[lane] = 0;
    }
  }
  RowSoftmax lane(int lane) const { return {max[lane], sum[lane], nan[lane] != 0}; }
};

// Appends masked tokens to a tile until kSumChains divides their number, which is returned.
NABLA_FAST_INLINE int pad_to_chains(float* z, int lanes, int tokens) {
  const int whole = (tokens + kSumChains - 1) / kSumChains * kSumChains;
  for (int n = tokens * lanes; n < whole * lanes; ++n) z[n] = -kInfinity;
  return whole;
}

// max[W] = maximum of it and of `tokens` tokens z[t * lanes]; nan[W] |= whether one is NaN. Returns
// whether the maximum of any lane moved.
template <int W>
NABLA_FAST_INLINE bool update_max(const float* z, int lanes, int tokens, float* max, int32_t* nan) {
  const Floats<W> before = load<W>(max);
  Floats<W> top = before;
  Ints<W> unordered = {};
  for (int t = 0; t < tokens; ++t) {
    const Floats<W> x = load<W>(z + t * lanes);
    top = x > top ? x : top;
    unordered |= x != x;
  }
  store<W>(max, top);
  for (int lane = 0; lane < W; ++lane) nan[lane] |= unordered[lane];
  return any_lane<W>(top > before);
}

// Subtrahend of exponents: the maximum, or 0 instead of -inf, where -inf - -inf would be NaN.
template <int W>
NABLA_FAST_INLINE Floats<W> exponent_base(const float* max) {
  const Floats<W> top = load<W>(max);
  return top > splat<W>(-kInfinity) ? top : Floats<W>{};
}

// Adds a tile z[tokens, lanes]; kSumChains divides `tokens`.
template <int W>
NABLA_FAST_INLINE void add_exps(const float* z, int lanes, int tokens, LaneSoftmax& sums) {
  for (int lane = 0; lane < lanes; lane += W) {
    float before[W];
    store<W>(before, load<W>(sums.max + lane));
    if (update_max<W>(z + lane, lanes, tokens, sums.max + lane, sums.nan + lane)) {
      for (int n = lane; n < lane + W; ++n)
        if (sums.max[n] > before[n - lane]) sums.sum[n] *= rescale(before[n - lane], sums.max[n]);
    }
    const Floats<W> base = exponent_base<W>(sums.max + lane);
    Floats<W> chain[kSumChains] = {};
    for (int t = 0; t < tokens; t += kSumChains) {
#pragma GCC unroll 4
      for (int c = 0; c < kSumChains; ++c) {
        const Floats<W> x = load<W>(z + (t + c) * lanes + lane) - base;
        chain[c] += vec_exp_or_zero<W>(x);
      }
    }
    const Floats<W> sum = (chain[0] + chain[1]) + (chain[2] + chain[3]);
    for (int n = 0; n < W; ++n) sums.sum[lane + n] += static_cast<double>(sum[n]);
  }
}

}  // namespace nabla_fast::softmax

#endif  // NABLA_FAST_CPU_SOFTMAX_ROW_SOFTMAX_H_
