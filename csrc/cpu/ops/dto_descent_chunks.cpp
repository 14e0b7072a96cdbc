// ChunkPasses for each instruction set: loops over the vectors of a chunk.

#include "ops/dto_descent_chunks.h"

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>

#include "base/floats.h"
#include "base/isa.h"
#include "simd/gumbel.h"
#include "simd/vec.h"

namespace nabla_fast::descent {
namespace {

// Tokens of one turn of a step, while the next ones are prefetched: both fit the first-level cache.
// Their sums are formed before they are added to those of a chunk, which keeps the rounding small.
constexpr int64_t kStepTokens = 256;

template <int W>
struct LaneSums {
  Floats<W> sum = {}, weighted_grad_sum = {}, max = splat<W>(-kInfinity), second = {};
};

template <int W, bool kNoise>
NABLA_FAST_INLINE Floats<W> load_y(const Row& row, int64_t i) {
  const Floats<W> z = load<W>(row.z + i);
  return kNoise ? z + load<W>(row.noise + i) : z;
}

template <int W, bool kNoise>
NABLA_FAST_INLINE void find_max_lanes(const Row& row, int64_t n, LaneSums<W>& lanes) {
  for (int64_t i = 0; i < n; i += W) {
    const Floats<W> y = load_y<W, kNoise>(row, i);
    lanes.max = y > lanes.max ? y : lanes.max;
    // `sum` is not in use yet: NaN marks a NaN or an infinity.
    lanes.sum += select<W>(above<W>(y, kMaxFloat), splat<W>(kNaN), Floats<W>{});
  }
}

#if NABLA_FAST_AVX512_BUILTINS
// exp2(k / 32), as bits.
alignas(64) constexpr uint32_t kExp2Of32nds[32] = {
    0x3F800000u, 0x3F82CD87u, 0x3F85AAC3u, 0x3F88980Fu, 0x3F8B95C2u, 0x3F8EA43Au, 0x3F91C3D3u,
    0x3F94F4F0u, 0x3F9837F0u, 0x3F9B8D3Au, 0x3F9EF532u, 0x3FA27043u, 0x3FA5FED7u, 0x3FA9A15Bu,
    0x3FAD583Fu, 0x3FB123F6u, 0x3FB504F3u, 0x3FB8FBAFu, 0x3FBD08A4u, 0x3FC12C4Du, 0x3FC5672Au,
    0x3FC9B9BEu, 0x3FCE248Cu, 0x3FD2A81Eu, 0x3FD744FDu, 0x3FDBFBB8u, 0x3FE0CCDFu, 0x3FE5B907u,
    0x3FEAC0C7u, 0x3FEFE4BAu, 0x3FF5257Du, 0x3FFA83B3u};
#endif

// exp(d / tau) where the mask holds, 0 where it does not.
template <int W>
struct Exponential {
  float inverse_high, inverse_low;

  NABLA_FAST_INLINE explicit Exponential(const Centre& centre)
      : inverse_high(centre.tau.inverse_high), inverse_low(centre.tau.inverse_low) {}
  NABLA_FAST_INLINE Floats<W> operator()(Mask<W> mask, Floats<W> d) const {
    return vec_exp2<W>(mask, d, inverse_high, inverse_low);
  }
};

#if NABLA_FAST_AVX512_BUILTINS
// With a table in two registers the chain of operations is half as long, so that more vectors are
// in flight at once. The relative error, 2^-23 + 2^-25 |d / tau|, is least where terms are
// largest.
template <>
struct Exponential<16> {
  float inverse;
  Floats<16> lower, upper;

  NABLA_FAST_INLINE explicit Exponential(const Centre& centre) : inverse(centre.tau.inverse_high) {
    std::memcpy(&lower, kExp2Of32nds, sizeof lower);
    std::memcpy(&upper, kExp2Of32nds + 16, sizeof upper);
  }
  NABLA_FAST_INLINE Floats<16> operator()(Mask<16> mask, Floats<16> d) const {
    // Adding 1.5 * 2^18 rounds to 32nds; how many, modulo 32, the low bits of the sum tell.
    const float round = 393216.0f;
    const Floats<16> shifted = d * inverse + round;
    const Floats<16> n = shifted - round;
    const Floats<16> f = d * inverse - n;
    const Floats<16> power = avx512::looked_up((Ints<16>)shifted, lower, upper);
    // Minimax for (exp2(f) - 1) / f on |f| <= 1/64: 2^-24.2 relative to exp2(f).
    const Floats<16> q = f * 0.240225941f + 0.693157315f;
    return avx512::scaled(mask, power * f * q + power, n);
  }
};
#endif

// Adds tokens, at most kStepTokens.
template <int W, bool kNoise>
NABLA_FAST_INLINE void sum_exps_lanes(const Row& row, int64_t n, Centre centre, int64_t prefetch,
                                      LaneSums<W>& lanes) {
  const Exponential<W> exponential(centre);
  Floats<W> sum = {}, weighted_grad_sum = {};
  for (int64_t i = 0; i < n; i += W) {
    __builtin_prefetch(row.e + i + prefetch, 1);
    __builtin_prefetch(row.grad + i + prefetch);
    const Floats<W> d = load_y<W, kNoise>(row, i) - centre.top;
    const Mask<W> counts = above<W>(d, centre.tau.lowest);
    const Floats<W> e = exponential(counts, d);
    const Floats<W> g = load<W>(row.grad + i) - centre.grad;
    store<W>(row.e + i, e);
    sum += e;
    // G may be infinite where p is 0.
    weighted_grad_sum = select<W>(counts, weighted_grad_sum + e * g, weighted_grad_sum);
  }
  lanes.sum += sum;
  lanes.weighted_grad_sum += weighted_grad_sum;
}

// Moments after a step.
template <int W>
NABLA_FAST_INLINE void moment_lanes(const Row& row, int64_t n, Step step, LaneSums<W>& lanes) {
  const float share1 = static_cast<float>(1 - kBeta1), beta2 = static_cast<float>(kBeta2);
  const float per_root = static_cast<float>((1 - kBeta1) / std::sqrt(1 - kBeta2));
  for (int64_t i = 0; i < n; i += W) {
    const Floats<W> e = load<W>(row.e + i);
    const Floats<W> centred = (load<W>(row.grad + i) - step.centre.grad) * step.weight - step.mean;
    // The gradient times the square root of 1 - beta2.
    const Floats<W> root = select<W>(above<W>(e, 0.0f), e * centred, Floats<W>{});
    const Floats<W> m = load<W>(row.exp_avg + i);
    const Floats<W> second = root * root + beta2 * load<W>(row.exp_avg_sq + i);
    store<W>(row.exp_avg + i, root * per_root + (m - share1 * m));
    store<W>(row.exp_avg_sq + i, second);
    lanes.second = second > lanes.second ? second : lanes.second;
  }
}

// Logits after a step with these moments, and the largest y.
template <int W, bool kNoise>
NABLA_FAST_INLINE void move_lanes(const Row& row, int64_t n, Step step, LaneSums<W>& lanes) {
  for (int64_t i = 0; i < n; i += W) {
    const Floats<W> root = vec_sqrt<W>(load<W>(row.exp_avg_sq + i));
    const Floats<W> moved =
        load<W>(row.z + i) -
        step.adam.rate * (load<W>(row.exp_avg + i) / (root * step.adam.scale + kEpsilon));
    store<W>(row.z + i, moved);
    const Floats<W> y = kNoise ? moved + load<W>(row.noise + i) : moved;
    lanes.max = y > lanes.max ? y : lanes.max;
  }
}

// The same, within about 2^-26 of a move, by estimates and one step of Newton's method each: a
// division and a square root take the divider as long as all the rest takes the other units. For
// second moments of at most kEstimated.
constexpr float kEstimated = 0x1p40f;
template <int W, bool kNoise>
NABLA_FAST_INLINE void move_lanes_fast(const Row& row, int64_t n, Step step, int64_t prefetch,
                                       LaneSums<W>& lanes) {
  // With a = scale / rate, a move is first / (a sqrt(second) + epsilon / rate). The square root of
  // a^2 second / 4 is half of the first term; 2^-126 keeps it from 0, where 1 / sqrt is infinite.
  const float quarter =
      0.25f * (step.adam.scale / step.adam.rate) * (step.adam.scale / step.adam.rate);
  const float epsilon = kEpsilon / step.adam.rate;
  for (int64_t i = 0; i < n; i += W) {
    __builtin_prefetch(row.z + i + prefetch, 1);
    __builtin_prefetch(row.exp_avg + i + prefetch, 1);
    __builtin_prefetch(row.exp_avg_sq + i + prefetch, 1);
    const Floats<W> x = load<W>(row.exp_avg_sq + i) * quarter + 0x1p-126f;
    const Floats<W> inverse = vec_rsqrt14(x);
    const Floats<W> half = x * inverse;
    const Floats<W> error = 1.0f - half * inverse;
    const Floats<W> divisor = half * error + (half * 2.0f + epsilon);
    const Floats<W> estimate = vec_rcp14(divisor);
    const Floats<W> refined = 2.0f - divisor * estimate;
    const Floats<W> moved = load<W>(row.z + i) - load<W>(row.exp_avg + i) * estimate * refined;
    store<W>(row.z + i, moved);
    const Floats<W> y = kNoise ? moved + load<W>(row.noise + i) : moved;
    lanes.max = y > lanes.max ? y : lanes.max;
  }
}

// A step, without the sums of the next.
template <int W, bool kNoise>
NABLA_FAST_INLINE void step_lanes(const Row& row, int64_t n, const Step& step, int64_t prefetch,
                                  LaneSums<W>& lanes) {
  moment_lanes<W>(row, n, step, lanes);
  if constexpr (kHasEstimates<W>) {
    if (step.ordinary() && !any_lane<W>(above<W>(lanes.second, kEstimated))) {
      move_lanes_fast<W, kNoise>(row, n, step, prefetch, lanes);
      return;
    }
  }
  move_lanes<W, kNoise>(row, n, step, lanes);
}

// Last tokens of a row, fewer than a vector, with masked ones behind them.
template <int W>
struct Tail {
  alignas(64) float z[W], grad[W] = {}, exp_avg[W] = {},
                          exp_avg_sq[W] = {}, e[W] = {}, noise[W] = {};

  NABLA_FAST_INLINE Tail(const Row& row, int64_t n) {
    for (int64_t i = 0; i < W; ++i) z[i] = -kInfinity;
    for (int64_t i = 0; i < n; ++i) {
      z[i] = row.z[i];
      grad[i] = row.grad[i];
      exp_avg[i] = row.exp_avg[i];
      exp_avg_sq[i] = row.exp_avg_sq[i];
      if (row.e) e[i] = row.e[i];
      if (row.noise) noise[i] = row.noise[i];
    }
  }
  NABLA_FAST_INLINE Row row() { return {z, grad, exp_avg, exp_avg_sq, e, noise}; }
  NABLA_FAST_INLINE void put_back(const Row& row, int64_t n) const {
    for (int64_t i = 0; i < n; ++i) {
      row.z[i] = z[i];
      row.exp_avg[i] = exp_avg[i];
      row.exp_avg_sq[i] = exp_avg_sq[i];
      row.e[i] = e[i];
    }
  }
};

template <int W>
NABLA_FAST_INLINE void join_lanes(const LaneSums<W>& lanes, ChunkSums& partial) {
  partial.sum = partial.weighted_grad_sum = 0;
  for (int lane = 0; lane < W; ++lane) {
    partial.sum += lanes.sum[lane];
    partial.weighted_grad_sum += lanes.weighted_grad_sum[lane];
  }
  partial.max = lane_max<W>(lanes.max);
  partial.second = lane_max<W>(lanes.second);
  partial.nonfinite = std::isnan(partial.sum);
}

// Largest y of a chunk of n tokens, and whether one is not finite.
template <int W, bool kNoise>
NABLA_FAST_INLINE void find_max(const Row& row, int64_t n, ChunkSums& partial) {
  const int64_t whole = n / W * W;
  LaneSums<W> lanes;
  find_max_lanes<W, kNoise>(row, whole, lanes);
  if (n > whole) {
    Tail<W> tail(row.from(whole), n - whole);
    find_max_lanes<W, kNoise>(tail.row(), W, lanes);
  }
  join_lanes<W>(lanes, partial);
}

// S and T of a chunk, and whether one is not finite; other fields of `partial` stay.
template <int W, bool kNoise>
NABLA_FAST_INLINE void sum_exps(const Row& row, int64_t n, const Centre& centre,
                                ChunkSums& partial) {
  const int64_t whole = n / W * W;
  LaneSums<W> lanes;
  for (int64_t begin = 0; begin < whole; begin += kStepTokens)
    sum_exps_lanes<W, kNoise>(row.from(begin), std::min(kStepTokens, whole - begin), centre, 0,
                              lanes);
  if (n > whole) {
    Tail<W> tail(row.from(whole), n - whole);
    sum_exps_lanes<W, kNoise>(tail.row(), W, centre, 0, lanes);
    tail.put_back(row.from(whole), n - whole);
  }
  ChunkSums joined;
  join_lanes<W>(lanes, joined);
  partial.sum = joined.sum;
  partial.weighted_grad_sum = joined.weighted_grad_sum;
  partial.nonfinite = joined.nonfinite;
}

// A step of a chunk. token: the hard token's index in it; outside of [0, n) if it is elsewhere.
template <int W, bool kNoise>
NABLA_FAST_INLINE void take_step(const Row& row, int64_t n, const Step& step, int64_t token,
                                 int64_t prefetch, ChunkSums& partial) {
  const int64_t whole = n / W * W;
  LaneSums<W> lanes;
  for (int64_t begin = 0; begin < whole; begin += kStepTokens) {
    const Row block = row.from(begin);
    const int64_t size = std::min(kStepTokens, whole - begin);
    const int64_t next = begin + kStepTokens < whole ? kStepTokens : prefetch - begin;
    step_lanes<W, kNoise>(block, size, step, next, lanes);
    sum_exps_lanes<W, kNoise>(block, size, step.centre, next, lanes);
  }
  if (n > whole) {
    Tail<W> tail(row.from(whole), n - whole);
    step_lanes<W, kNoise>(tail.row(), W, step, 0, lanes);
    sum_exps_lanes<W, kNoise>(tail.row(), W, step.centre, 0, lanes);
    tail.put_back(row.from(whole), n - whole);
  }
  join_lanes<W>(lanes, partial);
  if (token < 0 || token >= n) return;
  partial.token = row.y(token);
  partial.tied = false;
  for (int64_t i = 0; i < token; ++i) partial.tied |= row.y(i) == partial.token;
}

template <int W>
NABLA_FAST_INLINE void noise_kernel(int64_t seed, int64_t position, int64_t token, int64_t n,
                                    float* noise) {
  gumbel_noise<W / 2>(seed, position, token, n, noise);
}

NABLA_FAST_FOR_EACH_ISA(find_max_plain, find_max<W, false>)
NABLA_FAST_FOR_EACH_ISA(find_max_noisy, find_max<W, true>)
NABLA_FAST_FOR_EACH_ISA(sum_exps_plain, sum_exps<W, false>)
NABLA_FAST_FOR_EACH_ISA(sum_exps_noisy, sum_exps<W, true>)
NABLA_FAST_FOR_EACH_ISA(take_step_plain, take_step<W, false>)
NABLA_FAST_FOR_EACH_ISA(take_step_noisy, take_step<W, true>)
NABLA_FAST_FOR_EACH_ISA(noise_of_tokens, noise_kernel<W>)

}  // namespace

ChunkPasses::ChunkPasses(bool noise, nabla_fast_isa isa)
    : find_max((noise ? find_max_noisy : find_max_plain).select(isa)),
      sum_exps((noise ? sum_exps_noisy : sum_exps_plain).select(isa)),
      take_step((noise ? take_step_noisy : take_step_plain).select(isa)) {}

void draw_noise(int64_t seed, int64_t position, int64_t token, int64_t n, float* noise) {
  noise_of_tokens(seed, position, token, n, noise);
}

}  // namespace nabla_fast::descent
