// Tiles of gradients: weighted_grad_sum() and softmax_jacobian().

#include <cmath>
#include <cstdint>

#include "base/isa.h"
#include "simd/vec.h"
#include "softmax/relaxed_tiles.h"

namespace nabla_fast::softmax {
namespace {

template <int W>
NABLA_FAST_INLINE void weighted_grad_sum_lanes_kernel(float* y, float* grad, int lanes, int tokens,
                                                      const float* max, const float* centre,
                                                      float inverse, float* sum_e,
                                                      float* sum_weighted_grad) {
  const Floats<W> zero = {};
  for (int lane = 0; lane < lanes; lane += W) {
    const Floats<W> top = load<W>(max + lane), c = load<W>(centre + lane);
    Floats<W> sum = {}, weighted_grad = {};
    for (int t = 0; t < tokens; ++t) {
      const int64_t at = t * lanes + lane;
      const Floats<W> e = vec_exp_or_zero<W>((load<W>(y + at) - top) * inverse);
      const Floats<W> g = e > 0.0f ? load<W>(grad + at) - c : zero;
      store<W>(y + at, e);
      store<W>(grad + at, g);
      sum += e;
      weighted_grad += e * g;
    }
    store<W>(sum_e + lane, sum);
    store<W>(sum_weighted_grad + lane, weighted_grad);
  }
}

template <int W>
NABLA_FAST_INLINE void jacobian_lanes_kernel(const float* y, float* grad, int lanes, int tokens,
                                             const float* max, const float* mean,
                                             const float* weight, float inverse) {
  const Floats<W> zero = {};
  for (int lane = 0; lane < lanes; lane += W) {
    const Floats<W> top = load<W>(max + lane), m = load<W>(mean + lane), w = load<W>(weight + lane);
    for (int t = 0; t < tokens; ++t) {
      const int64_t at = t * lanes + lane;
      const Floats<W> e = vec_exp_or_zero<W>((load<W>(y + at) - top) * inverse);
      store<W>(grad + at, e > 0.0f ? e * w * (load<W>(grad + at) - m) : zero);
    }
  }
}

NABLA_FAST_FOR_EACH_ISA(weighted_grad_sum_lanes, weighted_grad_sum_lanes_kernel<W>)
NABLA_FAST_FOR_EACH_ISA(jacobian_lanes, jacobian_lanes_kernel<W>)

// Sum of e (G - c) of a row in a tile that weighted_grad_sum_lanes() has left, where that of fp32
// overflows.
double weighted_grad_sum_in_double(const float* e, const float* grad, int lanes, int row,
                                   int tokens) {
  double sum = 0;
  for (int t = 0; t < tokens; ++t)
    sum += static_cast<double>(e[t * lanes + row]) * grad[t * lanes + row];
  return sum;
}

}  // namespace

void weighted_grad_sum(float* y, float* grad, int rows, int tokens, const float* max,
                       const float* centre, double tau, Sums& sums) {
  alignas(64) float e[gemm::kRowsPerGroup], weighted_grad[gemm::kRowsPerGroup];
  const int lanes = gemm::lanes_of(rows);
  weighted_grad_sum_lanes(y, grad, lanes, tokens, max, centre, static_cast<float>(1 / tau), e,
                          weighted_grad);
  for (int r = 0; r < rows; ++r) {
    sums.e[r] += e[r];
    sums.weighted_grad_sum[r] += std::isfinite(weighted_grad[r])
                                     ? weighted_grad[r]
                                     : weighted_grad_sum_in_double(y, grad, lanes, r, tokens);
  }
}

void softmax_jacobian(const float* y, float* grad, int rows, int tokens, const float* max,
                      const float* mean, const float* weight, double tau) {
  jacobian_lanes(y, grad, gemm::lanes_of(rows), tokens, max, mean, weight,
                 static_cast<float>(1 / tau));
}

}  // namespace nabla_fast::softmax
