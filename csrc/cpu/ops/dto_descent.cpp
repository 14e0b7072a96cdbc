// nabla_fast_dto_descent: one pass over a row's four arrays for each step.
//
// A step needs S = sum of exp((y - M) / tau) and T = sum of exp((y - M) / tau) (G - G[token]) over
// the row before it can move a logit, y being z plus its noise. The pass that takes a step adds up
// the S and T of the next: M stays what it was as long as the largest y stays near it, and G[token]
// does as long as the row descends, since it stops when its token changes.
//
// The exponentials are kept in the workspace for the next step: reading one costs less than
// computing it again.
//
// A row is cut into chunks of 1,024 tokens, by position alone. A chunk's sums are taken in fp32
// lanes and joined in double from left to right, whoever computed them.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>

#ifdef _OPENMP
  #include <omp.h>
#endif

#include "base/check.h"
#include "base/floats.h"
#include "base/flush.h"
#include "base/isa.h"
#include "base/threads.h"
#include "nabla_fast.h"
#include "ops/dto_descent.h"
#include "simd/gumbel.h"
#include "simd/vec.h"
#include "softmax/row_status.h"
#include "softmax/tau.h"

namespace nabla_fast::descent {
namespace {

constexpr int64_t kChunkTokens = 1024;
// Tokens of one turn of a step, while the next ones are prefetched: both fit the first-level cache.
constexpr int64_t kStepTokens = 256;
// Tokens times steps worth another thread, and tokens of a row worth another one: threads of a row
// wait for each other after every step.
constexpr int64_t kWorkPerThread = int64_t{1} << 17;
constexpr int64_t kTokensPerThread = int64_t{1} << 15;

// Distance that the largest y / tau may move before the sums are taken relative to it anew.
constexpr double kDrift = 8;

// Arrays of a row, or of a chunk of it.
struct Row {
  float* z;
  const float* grad;
  float* exp_avg;
  float* exp_avg_sq;
  float* e;            // exp((y - M) / tau) as the last sums took it; null before the first
  const float* noise;  // null where there is none

  Row from(int64_t begin) const {
    return {z + begin,
            grad + begin,
            exp_avg + begin,
            exp_avg_sq + begin,
            e ? e + begin : nullptr,
            noise ? noise + begin : nullptr};
  }
  float y(int64_t i) const { return noise ? z[i] + noise[i] : z[i]; }
};

// Numbers that the sums are relative to.
struct Centre {
  float top;   // M
  float grad;  // G[token]
  softmax::Tau tau;
};

struct Step {
  Centre centre;
  float weight;  // sqrt(1 - beta2) / (S tau)
  float mean;    // T / S, times the weight
  AdamRate adam;

  // True if the step may divide by estimates: nothing overflows, and subnormal numbers, which
  // estimates do not take, are lost beside epsilon.
  bool ordinary() const { return adam.rate >= 0x1p-30f && adam.rate <= 0x1p4f; }
};

// Sums and maxima of a chunk.
struct ChunkSums {
  double sum;                // S
  double weighted_grad_sum;  // T
  float max;                 // of y
  float second;              // largest second moment
  float token;               // y of the hard token; only of its own chunk
  bool tied;                 // whether a token before the hard token equals it; likewise
  bool nonfinite;            // whether a y is NaN or +inf
};

// -- a chunk --------------------------------------------------------------------------------------

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
// under way at once; relatively within 2^-23 + 2^-25 |d / tau|, which weighs nothing at the
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
    const Floats<16> power =
        __builtin_ia32_vpermt2varps512_mask((Ints<16>)shifted, lower, upper, -1);
    // Minimax for (exp2(f) - 1) / f on |f| <= 1/64: 2^-24.2 relative to exp2(f).
    const Floats<16> q = f * 0.240225941f + 0.693157315f;
    return __builtin_ia32_scalefps512_mask(power * f * q + power, n, Floats<16>{}, mask, 4);
  }
};
#endif

template <int W, bool kNoise>
NABLA_FAST_INLINE void sum_exps_lanes(const Row& row, int64_t n, Centre centre, int64_t prefetch,
                                      LaneSums<W>& lanes) {
  const Exponential<W> exponential(centre);
  for (int64_t i = 0; i < n; i += W) {
    __builtin_prefetch(row.e + i + prefetch, 1);
    __builtin_prefetch(row.grad + i + prefetch);
    const Floats<W> d = load_y<W, kNoise>(row, i) - centre.top;
    const Mask<W> counts = above<W>(d, centre.tau.lowest);
    const Floats<W> e = exponential(counts, d);
    const Floats<W> g = load<W>(row.grad + i) - centre.grad;
    store<W>(row.e + i, e);
    lanes.sum += e;
    // G may be infinite where p is 0.
    lanes.weighted_grad_sum =
        select<W>(counts, lanes.weighted_grad_sum + e * g, lanes.weighted_grad_sum);
  }
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

// One step, but for the sums of the next.
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
  sum_exps_lanes<W, kNoise>(row, whole, centre, 0, lanes);
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

// One step of a chunk. token: the hard token's index in it; outside of [0, n) if it is elsewhere.
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

// Noise of n tokens from `token` on.
template <int W>
NABLA_FAST_INLINE void draw_noise_kernel(int64_t seed, int64_t position, int64_t token, int64_t n,
                                         float* noise) {
  gumbel_noise<W / 2>(seed, position, token, n, noise);
}

NABLA_FAST_FOR_EACH_ISA(find_max_plain, find_max<W, false>)
NABLA_FAST_FOR_EACH_ISA(find_max_noisy, find_max<W, true>)
NABLA_FAST_FOR_EACH_ISA(sum_exps_plain, sum_exps<W, false>)
NABLA_FAST_FOR_EACH_ISA(sum_exps_noisy, sum_exps<W, true>)
NABLA_FAST_FOR_EACH_ISA(take_step_plain, take_step<W, false>)
NABLA_FAST_FOR_EACH_ISA(take_step_noisy, take_step<W, true>)
NABLA_FAST_FOR_EACH_ISA(draw_noise, draw_noise_kernel<W>)

// Passes over a chunk, with noise or without.
struct Passes {
  void (*find_max)(const Row&, int64_t, ChunkSums&);
  void (*sum_exps)(const Row&, int64_t, const Centre&, ChunkSums&);
  void (*take_step)(const Row&, int64_t, const Step&, int64_t, int64_t, ChunkSums&);

  Passes(bool noise, nabla_fast_isa isa)
      : find_max((noise ? find_max_noisy : find_max_plain).select(isa)),
        sum_exps((noise ? sum_exps_noisy : sum_exps_plain).select(isa)),
        take_step((noise ? take_step_noisy : take_step_plain).select(isa)) {}
};

// -- a row ----------------------------------------------------------------------------------------

// Arguments of a call.
struct Call {
  float* z;
  const float* grad;
  float* exp_avg;
  float* exp_avg_sq;
  int64_t rows, vocab;
  int64_t z_stride, grad_stride, exp_avg_stride, exp_avg_sq_stride;
  Steps steps;
  const int64_t* group;
  double tau;
  const int64_t* noise_seed;
  const int64_t* noise_position;
  int64_t* token;
  uint8_t* flipped;

  int64_t chunks() const { return (vocab + kChunkTokens - 1) / kChunkTokens; }
  Row row(int64_t index) const {
    return {z + index * z_stride,
            grad + index * grad_stride,
            exp_avg + index * exp_avg_stride,
            exp_avg_sq + index * exp_avg_sq_stride,
            nullptr,
            nullptr};
  }
};

// Memory for one row at a time.
struct Scratch {
  ChunkSums* partials[2];  // [chunks] each
  float* e;                // [vocab]
  float* noise;            // [vocab], or null
  float* copy;             // [3, vocab], or null: a row to try steps on
};

// Threads that share a row.
struct ThreadGroup {
  int rank, size;

  void barrier() const {
    if (size > 1) {
#pragma omp barrier
    }
  }
  int64_t begin(int64_t chunks) const { return chunks * rank / size; }
  int64_t end(int64_t chunks) const { return chunks * (rank + 1) / size; }
};

struct Outcome {
  int64_t taken;  // steps
  int64_t token;
  bool flipped;
};

// torch's argmax: the first NaN, or else the first of the largest.
int64_t argmax_any(const Row& row, int64_t vocab) {
  int64_t best = 0;
  for (int64_t i = 0; i < vocab; ++i) {
    if (std::isnan(row.y(i))) return i;
    if (row.y(i) > row.y(best)) best = i;
  }
  return best;
}

class Descent {
 public:
  Descent(const Call& call, const Passes& passes, const Row& row, const Scratch& scratch,
          ThreadGroup threads)
      : call_(call),
        passes_(passes),
        row_(row),
        partials_{scratch.partials[0], scratch.partials[1]},
        threads_(threads),
        chunks_(call.chunks()) {}

  // Takes at most `most` steps of row `index`. No logit is NaN or +inf, and one is finite.
  Outcome run(int64_t index, int64_t most) {
    each_chunk([&](const Row& chunk, int64_t n, int64_t, ChunkSums& partial) {
      passes_.find_max(chunk, n, partial);
    });
    Outcome outcome{0, first_of_largest(), false};
    Centre centre{max_, row_.grad[outcome.token], softmax::Tau(call_.tau)};
    bool stale = true;  // whether the sums are not those of this centre
    while (outcome.taken < most && !outcome.flipped) {
      if (stale) {
        centre.top = max_;
        const ChunkSums* before = now();
        each_chunk([&](const Row& chunk, int64_t n, int64_t begin, ChunkSums& partial) {
          partial = before[begin / kChunkTokens];
          passes_.sum_exps(chunk, n, centre, partial);
        });
      }
      const Step step = next_step(index, outcome.taken, centre);
      ++outcome.taken;
      if (nonfinite_ || !std::isfinite(static_cast<float>(weighted_grad_sum_ / sum_))) {
        fill_nan();
        outcome.flipped = outcome.token != 0;
        outcome.token = 0;
        continue;
      }
      {
        const FlushToZero flush(may_flush(step));
        each_chunk([&](const Row& chunk, int64_t n, int64_t begin, ChunkSums& partial) {
          passes_.take_step(chunk, n, step, outcome.token - begin,
                            turn_ & 1 ? kChunkTokens : -kChunkTokens, partial);
        });
      }
      if (nonfinite_) {
        const int64_t moved = argmax_any(row_, call_.vocab);
        outcome.flipped = moved != outcome.token;
        outcome.token = moved;
        threads_.barrier();
      } else {
        outcome.flipped = leads_another(outcome.token);
      }
      stale = std::fabs(static_cast<double>(max_) - centre.top) > kDrift * call_.tau;
    }
    if (outcome.flipped && !nonfinite_) outcome.token = first_of_largest();
    return outcome;
  }

 private:
  ChunkSums* now() const { return partials_[turn_ & 1]; }

  // Calls work(chunk, tokens, first token, partial) for each of the thread's chunks, then takes the
  // row's totals. Passes go up and down in turn: each begins with the chunks still in the caches.
  template <typename Work>
  void each_chunk(const Work& work) {
    ++turn_;
    const int64_t first = threads_.begin(chunks_), last = threads_.end(chunks_) - 1;
    for (int64_t n = 0; n <= last - first; ++n) {
      const int64_t chunk = turn_ & 1 ? first + n : last - n;
      const int64_t begin = chunk * kChunkTokens;
      work(row_.from(begin), std::min(kChunkTokens, call_.vocab - begin), begin, now()[chunk]);
    }
    threads_.barrier();
    sum_ = weighted_grad_sum_ = 0;
    max_ = -kInfinity;
    second_ = 0;
    nonfinite_ = false;
    for (const ChunkSums* partial = now(); partial < now() + chunks_; ++partial) {
      sum_ += partial->sum;
      weighted_grad_sum_ += partial->weighted_grad_sum;
      max_ = std::max(max_, partial->max);
      second_ = std::max(second_, partial->second);
      nonfinite_ |= partial->nonfinite;
    }
    // A learning rate of infinity can mask every token.
    nonfinite_ |= max_ == -kInfinity;
  }

  Step next_step(int64_t index, int64_t taken, const Centre& centre) const {
    const double weight = std::sqrt(1 - kBeta2) / (sum_ * call_.tau);
    return {centre, static_cast<float>(weight),
            static_cast<float>(weighted_grad_sum_ / sum_ * weight), call_.steps.rate(index, taken)};
  }

  // Far below the largest logit, second moments are below 2^-126. They may become 0 beside much
  // larger ones, as long as no logits become equal to the largest by that.
  bool may_flush(const Step& step) const {
    const float of_token = step.mean * step.mean;
    return std::max(second_, of_token) >= 0x1p-100f && std::fabs(max_) >= 0x1p-100f;
  }

  int64_t first_of_largest() const {
    for (int64_t chunk = 0; chunk < chunks_; ++chunk) {
      if (now()[chunk].max != max_) continue;
      for (int64_t i = chunk * kChunkTokens;; ++i) {
        if (row_.y(i) == max_) return i;
      }
    }
    return 0;
  }

  // True if the argmax is no longer `token`, without reading other threads' chunks.
  bool leads_another(int64_t token) const {
    const int64_t own = token / kChunkTokens;
    if (now()[own].token != max_ || now()[own].tied) return true;
    return std::any_of(now(), now() + own, [&](const ChunkSums& p) { return p.max == max_; });
  }

  // A step of a row with a NaN or an infinity: its softmax is NaN.
  void fill_nan() {
    const int64_t begin = threads_.begin(chunks_) * kChunkTokens;
    const int64_t end = std::min(threads_.end(chunks_) * kChunkTokens, call_.vocab);
    for (float* array : {row_.z, row_.exp_avg, row_.exp_avg_sq}) {
      std::fill(array + begin, array + std::max(begin, end), kNaN);
    }
    nonfinite_ = true;
    threads_.barrier();
  }

  const Call& call_;
  const Passes& passes_;
  const Row row_;
  ChunkSums* const partials_[2];
  const ThreadGroup threads_;
  const int64_t chunks_;
  int64_t turn_ = 0;
  // Totals of the last pass.
  double sum_ = 0, weighted_grad_sum_ = 0;
  float max_ = -kInfinity, second_ = 0;
  bool nonfinite_ = false;
};

// Points a row to its scratch, and draws the thread's part of its noise there. A barrier follows
// before other threads read it.
void prepare_scratch(const Call& call, int64_t index, const Scratch& scratch, ThreadGroup threads,
                     Row& row) {
  row.e = scratch.e;
  if (!scratch.noise) return;
  row.noise = scratch.noise;
  const int64_t chunks = call.chunks();
  const int64_t begin = threads.begin(chunks) * kChunkTokens;
  const int64_t end = std::min(threads.end(chunks) * kChunkTokens, call.vocab);
  if (begin >= end) return;
  draw_noise(call.noise_seed[index], call.noise_position[index], begin, end - begin,
             scratch.noise + begin);
}

// Steps of a row in place, and their outcome.
void descend(const Call& call, const Passes& passes, int64_t index, int64_t most,
             const Scratch& scratch, ThreadGroup threads) {
  Row row = call.row(index);
  prepare_scratch(call, index, scratch, threads, row);
  const Outcome outcome = Descent(call, passes, row, scratch, threads).run(index, most);
  threads.barrier();  // the others still read the steps taken
  if (threads.rank > 0) return;
  call.steps.taken[index] += outcome.taken;
  call.token[index] = outcome.token;
  call.flipped[index] = outcome.flipped;
}

// Steps of a copy of a row until its token moves; the largest number if `most` do not move it.
int64_t steps_to_flip(const Call& call, const Passes& passes, int64_t index, int64_t most,
                      const Scratch& scratch, ThreadGroup threads) {
  Row row = call.row(index);
  prepare_scratch(call, index, scratch, threads, row);
  const int64_t chunks = call.chunks(), begin = threads.begin(chunks) * kChunkTokens;
  const int64_t end = std::max(begin, std::min(threads.end(chunks) * kChunkTokens, call.vocab));
  float* copy = scratch.copy;
  for (float** array : {&row.z, &row.exp_avg, &row.exp_avg_sq}) {
    std::copy(*array + begin, *array + end, copy + begin);
    *array = copy;
    copy += call.vocab;
  }
  const Outcome outcome = Descent(call, passes, row, scratch, threads).run(index, most);
  return outcome.flipped ? outcome.taken : std::numeric_limits<int64_t>::max();
}

// -- the rows -------------------------------------------------------------------------------------

struct Layout {
  int threads;  // at most
  int sharing;  // threads that share a row; 1: each thread has rows of its own
  int scratches;
  int64_t scratch_bytes, bytes;  // bytes: 0 if they are too many

  Layout(int64_t rows, int64_t vocab, int64_t iters, bool noise, bool groups, int32_t asked) {
    threads = threads_for((Size(rows) * vocab * std::max<int64_t>(iters, 1)).or_most(),
                          kWorkPerThread, asked);
    const int64_t most = std::clamp<int64_t>(vocab / kTokensPerThread, 1, threads);
    sharing = most > rows ? static_cast<int>(most) : 1;
    scratches =
        sharing > 1 ? 1 : static_cast<int>(std::min<int64_t>(threads, std::max<int64_t>(rows, 1)));
    const int64_t chunks = (vocab + kChunkTokens - 1) / kChunkTokens;
    scratch_bytes = whole_lines(2 * chunks * sizeof(ChunkSums)) + whole_lines(4 * vocab) +
                    (noise ? whole_lines(4 * vocab) : 0) + (groups ? whole_lines(12 * vocab) : 0);
    bytes =
        (kAlignment + Size(scratches) * scratch_bytes + Size(groups ? 3 * 8 : 0) * rows).or_zero();
  }
  static int64_t whole_lines(int64_t size) { return (size + 63) / 64 * 64; }

  Scratch scratch(char* workspace, int index, int64_t vocab, bool noise, bool groups) const {
    char* at = workspace + index * scratch_bytes;
    const int64_t chunks = (vocab + kChunkTokens - 1) / kChunkTokens;
    Scratch scratch{};
    scratch.partials[0] = reinterpret_cast<ChunkSums*>(at);
    scratch.partials[1] = scratch.partials[0] + chunks;
    at += whole_lines(2 * chunks * sizeof(ChunkSums));
    scratch.e = reinterpret_cast<float*>(at);
    at += whole_lines(4 * vocab);
    if (noise) {
      scratch.noise = reinterpret_cast<float*>(at);
      at += whole_lines(4 * vocab);
    }
    if (groups) scratch.copy = reinterpret_cast<float*>(at);
    return scratch;
  }
};

// True if the arrays of a call have a size, so that its workspace can be laid out.
bool sizes_fit(int64_t rows, int64_t vocab, int64_t iters) {
  return fits({{rows, 1}}, 24) && fits({{vocab, 1}}, 64) && fits({{iters, 1}}, 8);
}

nabla_fast_status status_of(const Call& call, const Passes& passes, int64_t index) {
  const Row row = call.row(index);
  float max = -kInfinity;
  for (int64_t begin = 0; begin < call.vocab; begin += kChunkTokens) {
    ChunkSums partial;
    passes.find_max(row.from(begin), std::min(kChunkTokens, call.vocab - begin), partial);
    if (partial.nonfinite) {
      const auto is_nan = [](float z) { return std::isnan(z); };
      return softmax::row_status(kInfinity, std::any_of(row.z + begin, row.z + call.vocab, is_nan));
    }
    max = std::max(max, partial.max);
  }
  return softmax::row_status(max, false);
}

// Calls work(row, scratch, threads) for every row, on all threads that share it.
template <typename Work>
void each_row(const Call& call, const Layout& layout, char* workspace, const Work& work) {
  const bool noise = call.noise_seed, groups = call.group;
  if (layout.sharing > 1) {
    const Scratch scratch = layout.scratch(workspace, 0, call.vocab, noise, groups);
#ifdef _OPENMP
  #pragma omp parallel num_threads(layout.sharing)
    {
      const ThreadGroup threads{omp_get_thread_num(), omp_get_num_threads()};
      for (int64_t row = 0; row < call.rows; ++row) {
        work(row, scratch, threads);
        threads.barrier();  // the scratch is free again
      }
    }
#else
    for (int64_t row = 0; row < call.rows; ++row) work(row, scratch, ThreadGroup{0, 1});
#endif
    return;
  }
#pragma omp parallel for num_threads(layout.scratches) schedule(dynamic) if (layout.scratches > 1)
  for (int64_t row = 0; row < call.rows; ++row) {
#ifdef _OPENMP
    const int rank = omp_get_thread_num();
#else
    const int rank = 0;
#endif
    work(row, layout.scratch(workspace, layout.scratches > 1 ? rank : 0, call.vocab, noise, groups),
         ThreadGroup{0, 1});
  }
}

nabla_fast_status run(const Call& call, nabla_fast_status* row_status, const Layout& layout,
                      char* workspace) {
  const nabla_fast_isa isa = nabla_fast_cpu_isa();
  const Passes plain(false, isa);
  bool good = true;
#pragma omp parallel for num_threads(layout.threads) reduction(&& : good) if (layout.threads > 1)
  for (int64_t row = 0; row < call.rows; ++row) {
    row_status[row] = status_of(call, plain, row);
    good = good && row_status[row] == NABLA_FAST_OK;
  }
  if (!good) return NABLA_FAST_BAD_ROWS;

  const Passes mine(call.noise_seed != nullptr, isa);
  StopGroups groups{};
  if (call.group) {
    groups.order = reinterpret_cast<int64_t*>(workspace + layout.scratches * layout.scratch_bytes);
    groups.leader = groups.order + call.rows;
    groups.earliest = groups.leader + call.rows;
    groups.sort(call.group, call.rows);
    each_row(call, layout, workspace,
             [&](int64_t row, const Scratch& scratch, ThreadGroup threads) {
               const int64_t leader = groups.leader[row];
               if (leader < 0) return;
               int64_t* earliest = &groups.earliest[leader];
               const int64_t so_far = __atomic_load_n(earliest, __ATOMIC_RELAXED);
               threads.barrier();  // all threads of a row must have read the same number
               const int64_t most = std::min(call.steps.left(row), so_far);
               const int64_t steps = steps_to_flip(call, mine, row, most, scratch, threads);
               if (threads.rank > 0) return;
#pragma omp critical(nabla_fast_dto_descent_earliest)
               if (steps < *earliest) __atomic_store_n(earliest, steps, __ATOMIC_RELAXED);
             });
  }
  each_row(call, layout, workspace, [&](int64_t row, const Scratch& scratch, ThreadGroup threads) {
    int64_t most = call.steps.left(row);
    if (call.group && groups.leader[row] >= 0) {
      most = std::min(most, groups.earliest[groups.leader[row]]);
    }
    descend(call, mine, row, most, scratch, threads);
  });
  return NABLA_FAST_OK;
}

}  // namespace
}  // namespace nabla_fast::descent

using namespace nabla_fast;
using namespace nabla_fast::descent;

int64_t nabla_fast_dto_descent_workspace(int64_t rows, int64_t vocab, int64_t iters, int32_t noise,
                                         int32_t groups, int32_t num_threads) {
  if (rows < 0 || vocab < 1 || iters < 0 || !sizes_fit(rows, vocab, iters)) return 0;
  return Layout(rows, vocab, iters, noise, groups, num_threads).bytes;
}

nabla_fast_status nabla_fast_dto_descent(
    float* z, const float* grad, float* exp_avg, float* exp_avg_sq, int64_t* step, int64_t rows,
    int64_t vocab, int64_t z_stride, int64_t grad_stride, int64_t exp_avg_stride,
    int64_t exp_avg_sq_stride, const double* schedule, int64_t iters, int64_t schedule_stride,
    const int64_t* until, const int64_t* group, double tau, const int64_t* noise_seed,
    const int64_t* noise_position, int64_t* token, uint8_t* flipped, nabla_fast_status* row_status,
    void* workspace, int64_t workspace_bytes, int32_t num_threads) {
  if (rows < 0 || vocab < 1 || iters < 0) return NABLA_FAST_INVALID_SHAPE;
  if (!is_tau(tau)) return NABLA_FAST_INVALID_TAU;
  if (rows == 0) return NABLA_FAST_OK;
  if (!sizes_fit(rows, vocab, iters) || !fits({{rows, schedule_stride}, {iters, 1}}, 8))
    return NABLA_FAST_TOO_LARGE;
  for (const int64_t stride : {z_stride, grad_stride, exp_avg_stride, exp_avg_sq_stride})
    if (!fits({{rows, stride}, {vocab, 1}}, 4)) return NABLA_FAST_TOO_LARGE;
  const Layout layout(rows, vocab, iters, noise_seed, group, num_threads);
  if (layout.bytes == 0) return NABLA_FAST_TOO_LARGE;
  if (!z || !grad || !exp_avg || !exp_avg_sq || !step || !token || !flipped || !row_status ||
      !workspace || (iters > 0 && !schedule) || !noise_seed != !noise_position) {
    return NABLA_FAST_INVALID_POINTER;
  }
  const Steps steps{step, schedule, iters, schedule_stride, until};
  if (!steps.valid(rows)) return NABLA_FAST_INVALID_STEPS;
  if (workspace_bytes < layout.bytes) return NABLA_FAST_WORKSPACE_TOO_SMALL;
  const Call call{z,     grad,     exp_avg,     exp_avg_sq,     rows,
                  vocab, z_stride, grad_stride, exp_avg_stride, exp_avg_sq_stride,
                  steps, group,    tau,         noise_seed,     noise_position,
                  token, flipped};
  return run(call, row_status, layout, aligned(workspace));
}
