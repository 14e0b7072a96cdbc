// nabla_fast_dto_descent: one pass over a row's four arrays for each step.
//
// A step needs S = sum of exp((y - M) / tau) and T = sum of exp((y - M) / tau) (G - G[token]) over
// the row before it can move a logit, y being z plus its noise. The pass that takes a step adds up
// the S and T of the next: M stays what it was as long as the largest y stays near it, and G[token]
// does as long as the row descends, since it stops when its token changes.
//
// The exponentials wait in the workspace for the next step: reading one costs less than taking it
// again.
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

#include "check.h"
#include "flush.h"
#include "gumbel.h"
#include "isa.h"
#include "nabla_fast.h"
#include "threads.h"
#include "vec.h"

namespace nabla_fast::cpu {
namespace {

constexpr int64_t kChunk = 1024;
// Less than this many tokens times steps is not worth waking a thread for, nor less than this many
// tokens of a row, whose threads meet after every step.
constexpr int64_t kWorkPerThread = int64_t{1} << 17;
constexpr int64_t kTokensPerThread = int64_t{1} << 15;

constexpr double kBeta1 = 0.9, kBeta2 = 0.999;
constexpr float kEpsilon = 1e-8f;
// exp of anything lower counts as 0.
constexpr float kLowest = -87.0f;
// How far the largest y / tau may move before the sums are taken anew from it.
constexpr double kDrift = 8;

constexpr float kInfinity = std::numeric_limits<float>::infinity();
constexpr float kMaxFloat = std::numeric_limits<float>::max();
constexpr float kNaN = std::numeric_limits<float>::quiet_NaN();

// Where a row, or a chunk of it, lies.
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

// What sums are relative to.
struct Centre {
  float top;      // M
  float grad;     // G[token]
  float inverse;  // 1 / tau
};

struct Step {
  Centre centre;
  float weight;  // 1 / (S tau)
  float mean;    // T / S
  float rate;    // learning rate / (1 - beta1^step)
  float scale;   // 1 / sqrt(1 - beta2^step)
};

// What a pass finds in a chunk.
struct Partial {
  double sum;    // S
  double tilt;   // T
  float max;     // of y
  float second;  // largest second moment
  float token;   // y of the hard token; only of its own chunk
  bool tied;     // whether a token before the hard token equals it; likewise
  bool unclean;  // whether a y is NaN or +inf
};

// -- a chunk
// ------------------------------------------------------------------------------------------

template <int W>
struct Found {
  Floats<W> sum = {}, tilt = {}, max = splat<W>(-kInfinity), second = {};
  Ints<W> unclean = {};
};

template <int W, bool kNoise>
NABLA_FAST_INLINE Floats<W> load_y(const Row& row, int64_t i) {
  const Floats<W> z = load<W>(row.z + i);
  return kNoise ? z + load<W>(row.noise + i) : z;
}

template <int W, bool kNoise>
NABLA_FAST_INLINE void survey_lanes(const Row& row, int64_t n, Found<W>& found) {
  for (int64_t i = 0; i < n; i += W) {
    const Floats<W> y = load_y<W, kNoise>(row, i);
    found.max = y > found.max ? y : found.max;
    found.unclean |= ~(y <= kMaxFloat);
  }
}

template <int W, bool kNoise>
NABLA_FAST_INLINE void measure_lanes(const Row& row, int64_t n, const Centre& centre,
                                     Found<W>& found) {
  const Floats<W> zero = {};
  for (int64_t i = 0; i < n; i += W) {
    const Floats<W> x = (load_y<W, kNoise>(row, i) - centre.top) * centre.inverse;
    const Floats<W> e = x > kLowest ? vec_exp_normal<W>(x) : zero;
    const Floats<W> g = load<W>(row.grad + i) - centre.grad;
    store<W>(row.e + i, e);
    found.sum += e;
    found.tilt += x > kLowest ? e * g : zero;  // G may be infinite where p is 0
  }
}

// The step, with the largest y it leads to. By itself a shorter chain of operations than together
// with the sums, so that more of the loop's turns overlap.
template <int W, bool kNoise>
NABLA_FAST_INLINE void move_lanes(const Row& row, int64_t n, const Step& step, Found<W>& found) {
  const Floats<W> zero = {};
  const float share1 = static_cast<float>(1 - kBeta1);
  const float beta2 = static_cast<float>(kBeta2), share2 = static_cast<float>(1 - kBeta2);
  for (int64_t i = 0; i < n; i += W) {
    const Floats<W> z = load<W>(row.z + i);
    const Floats<W> e = load<W>(row.e + i);
    const Floats<W> centred = load<W>(row.grad + i) - step.centre.grad - step.mean;
    const Floats<W> g = e > 0.0f ? e * step.weight * centred : zero;
    const Floats<W> m = load<W>(row.exp_avg + i);
    const Floats<W> first = m + share1 * (g - m);
    const Floats<W> second = beta2 * load<W>(row.exp_avg_sq + i) + share2 * g * g;
    const Floats<W> moved = z - step.rate * (first / (vec_sqrt<W>(second) * step.scale + kEpsilon));
    store<W>(row.exp_avg + i, first);
    store<W>(row.exp_avg_sq + i, second);
    store<W>(row.z + i, moved);
    const Floats<W> y = kNoise ? moved + load<W>(row.noise + i) : moved;
    found.max = y > found.max ? y : found.max;
    found.second = second > found.second ? second : found.second;
    found.unclean |= ~(y <= kMaxFloat);
  }
}

// The last tokens of a row, fewer than a vector, with masked ones behind them.
template <int W>
struct Rest {
  alignas(64) float z[W], grad[W] = {}, exp_avg[W] = {},
                          exp_avg_sq[W] = {}, e[W] = {}, noise[W] = {};

  NABLA_FAST_INLINE Rest(const Row& row, int64_t n) {
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
NABLA_FAST_INLINE void join_lanes(const Found<W>& found, Partial& partial) {
  partial.sum = partial.tilt = 0;
  for (int lane = 0; lane < W; ++lane) {
    partial.sum += found.sum[lane];
    partial.tilt += found.tilt[lane];
  }
  partial.max = lane_max<W>(found.max);
  partial.second = lane_max<W>(found.second);
  partial.unclean = any_lane<W>(found.unclean);
}

// Largest y of a chunk of n tokens, and whether all are clean.
template <int W, bool kNoise>
NABLA_FAST_INLINE void survey(const Row& row, int64_t n, Partial& partial) {
  const int64_t whole = n / W * W;
  Found<W> found;
  survey_lanes<W, kNoise>(row, whole, found);
  if (n > whole) {
    Rest<W> rest(row.from(whole), n - whole);
    survey_lanes<W, kNoise>(rest.row(), W, found);
  }
  join_lanes<W>(found, partial);
}

// S and T of a chunk; the rest of `partial` stays.
template <int W, bool kNoise>
NABLA_FAST_INLINE void measure(const Row& row, int64_t n, const Centre& centre, Partial& partial) {
  const int64_t whole = n / W * W;
  Found<W> found;
  measure_lanes<W, kNoise>(row, whole, centre, found);
  if (n > whole) {
    Rest<W> rest(row.from(whole), n - whole);
    measure_lanes<W, kNoise>(rest.row(), W, centre, found);
    rest.put_back(row.from(whole), n - whole);
  }
  Partial joined;
  join_lanes<W>(found, joined);
  partial.sum = joined.sum;
  partial.tilt = joined.tilt;
}

// One step of a chunk. token: the hard token's index in it; outside of [0, n) if it is elsewhere.
template <int W, bool kNoise>
NABLA_FAST_INLINE void advance(const Row& row, int64_t n, const Step& step, int64_t token,
                               Partial& partial) {
  const int64_t whole = n / W * W;
  Found<W> found;
  move_lanes<W, kNoise>(row, whole, step, found);
  measure_lanes<W, kNoise>(row, whole, step.centre, found);
  if (n > whole) {
    Rest<W> rest(row.from(whole), n - whole);
    move_lanes<W, kNoise>(rest.row(), W, step, found);
    measure_lanes<W, kNoise>(rest.row(), W, step.centre, found);
    rest.put_back(row.from(whole), n - whole);
  }
  join_lanes<W>(found, partial);
  if (token < 0 || token >= n) return;
  partial.token = row.y(token);
  partial.tied = false;
  for (int64_t i = 0; i < token; ++i) partial.tied |= row.y(i) == partial.token;
}

// Noise of n tokens from `token` on.
using NoiseOf = void(int64_t seed, int64_t position, int64_t token, int64_t n, float* noise);

// The passes for one instruction set, with noise or without.
struct Passes {
  void (*survey)(const Row&, int64_t, Partial&);
  void (*measure)(const Row&, int64_t, const Centre&, Partial&);
  void (*advance)(const Row&, int64_t, const Step&, int64_t, Partial&);
  NoiseOf* noise;
};

#define NABLA_FAST_PASSES(NAME, TARGET, W)                                                        \
  template <bool kNoise>                                                                          \
  TARGET void survey_##NAME(const Row& row, int64_t n, Partial& partial) {                        \
    survey<W, kNoise>(row, n, partial);                                                           \
  }                                                                                               \
  template <bool kNoise>                                                                          \
  TARGET void measure_##NAME(const Row& row, int64_t n, const Centre& centre, Partial& partial) { \
    measure<W, kNoise>(row, n, centre, partial);                                                  \
  }                                                                                               \
  template <bool kNoise>                                                                          \
  TARGET void advance_##NAME(const Row& row, int64_t n, const Step& step, int64_t token,          \
                             Partial& partial) {                                                  \
    advance<W, kNoise>(row, n, step, token, partial);                                             \
  }                                                                                               \
  TARGET void noise_##NAME(int64_t seed, int64_t position, int64_t token, int64_t n,              \
                           float* noise) {                                                        \
    gumbel_noise<W / 2>(seed, position, token, n, noise);                                         \
  }                                                                                               \
  template <bool kNoise>                                                                          \
  constexpr Passes kPasses_##NAME{survey_##NAME<kNoise>, measure_##NAME<kNoise>,                  \
                                  advance_##NAME<kNoise>, noise_##NAME};

NABLA_FAST_PASSES(baseline, , 4)
NABLA_FAST_PASSES(avx2, NABLA_FAST_TARGET_AVX2, 8)
NABLA_FAST_PASSES(avx512, NABLA_FAST_TARGET_AVX512, 16)
#undef NABLA_FAST_PASSES

template <bool kNoise>
const Passes& passes() {
  return *select_isa(&kPasses_baseline<kNoise>, &kPasses_avx2<kNoise>, &kPasses_avx512<kNoise>);
}

// -- a row
// --------------------------------------------------------------------------------------------

// The arguments of a call.
struct Call {
  float* z;
  const float* grad;
  float* exp_avg;
  float* exp_avg_sq;
  int64_t* step;
  int64_t rows, vocab;
  int64_t z_stride, grad_stride, exp_avg_stride, exp_avg_sq_stride;
  const double* schedule;
  int64_t iters, schedule_stride;
  const int64_t* until;
  const int64_t* group;
  double tau;
  const int64_t* noise_seed;
  const int64_t* noise_position;
  int64_t* token;
  uint8_t* flipped;

  int64_t chunks() const { return (vocab + kChunk - 1) / kChunk; }
  int64_t left(int64_t row) const {
    const int64_t last = until ? until[row] : iters;
    return last > step[row] ? last - step[row] : 0;
  }
  Row row(int64_t index) const {
    return {z + index * z_stride,
            grad + index * grad_stride,
            exp_avg + index * exp_avg_stride,
            exp_avg_sq + index * exp_avg_sq_stride,
            nullptr,
            nullptr};
  }
};

// Memory for one row that is being worked on.
struct Desk {
  Partial* partials[2];  // [chunks] each
  float* e;              // [vocab]
  float* noise;          // [vocab], or null
  float* copy;           // [3, vocab], or null: a row to try steps on
};

// The threads that share a row.
struct Team {
  int rank, size;

  void meet() const {
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
  Descent(const Call& call, const Passes& passes, const Row& row, const Desk& desk, Team team)
      : call_(call),
        passes_(passes),
        row_(row),
        partials_{desk.partials[0], desk.partials[1]},
        team_(team),
        chunks_(call.chunks()) {}

  // At most `most` steps of row `index`, of which no logit is NaN or +inf and one is finite.
  Outcome run(int64_t index, int64_t most) {
    each_chunk([&](const Row& chunk, int64_t n, int64_t, Partial& partial) {
      passes_.survey(chunk, n, partial);
    });
    Outcome outcome{0, first_of_largest(), false};
    Centre centre{max_, row_.grad[outcome.token], static_cast<float>(1 / call_.tau)};
    bool stale = true;  // whether the sums are not those of this centre
    while (outcome.taken < most && !outcome.flipped) {
      if (stale) {
        centre.top = max_;
        const Partial* before = now();
        each_chunk([&](const Row& chunk, int64_t n, int64_t begin, Partial& partial) {
          partial = before[begin / kChunk];
          passes_.measure(chunk, n, centre, partial);
        });
      }
      const Step step = next_step(index, outcome.taken, centre);
      ++outcome.taken;
      if (unclean_ || !std::isfinite(step.mean)) {
        spoil();
        outcome.flipped = outcome.token != 0;
        outcome.token = 0;
        continue;
      }
      {
        const FlushToZero flush(may_flush(step));
        each_chunk([&](const Row& chunk, int64_t n, int64_t begin, Partial& partial) {
          passes_.advance(chunk, n, step, outcome.token - begin, partial);
        });
      }
      if (unclean_) {
        const int64_t moved = argmax_any(row_, call_.vocab);
        outcome.flipped = moved != outcome.token;
        outcome.token = moved;
        team_.meet();
      } else {
        outcome.flipped = leads_another(outcome.token);
      }
      stale = std::fabs(static_cast<double>(max_) - centre.top) > kDrift * call_.tau;
    }
    if (outcome.flipped && !unclean_) outcome.token = first_of_largest();
    return outcome;
  }

 private:
  Partial* now() const { return partials_[turn_ & 1]; }

  // work(chunk, tokens, first token, partial) on each of the thread's chunks, and the row's totals.
  // One pass goes up and the next one down, so that it begins with what the caches still hold.
  template <typename Work>
  void each_chunk(const Work& work) {
    ++turn_;
    const int64_t first = team_.begin(chunks_), last = team_.end(chunks_) - 1;
    for (int64_t n = 0; n <= last - first; ++n) {
      const int64_t chunk = turn_ & 1 ? first + n : last - n;
      const int64_t begin = chunk * kChunk;
      work(row_.from(begin), std::min(kChunk, call_.vocab - begin), begin, now()[chunk]);
    }
    team_.meet();
    sum_ = tilt_ = 0;
    max_ = -kInfinity;
    second_ = 0;
    unclean_ = false;
    for (const Partial* partial = now(); partial < now() + chunks_; ++partial) {
      sum_ += partial->sum;
      tilt_ += partial->tilt;
      max_ = std::max(max_, partial->max);
      second_ = std::max(second_, partial->second);
      unclean_ |= partial->unclean;
    }
    // A learning rate of infinity can mask every token.
    unclean_ |= max_ == -kInfinity;
  }

  Step next_step(int64_t index, int64_t taken, const Centre& centre) const {
    const int64_t before = call_.step[index] + taken;
    const double count = static_cast<double>(before + 1);
    const double lr = call_.schedule[index * call_.schedule_stride + before];
    return {centre, static_cast<float>(1 / (sum_ * call_.tau)), static_cast<float>(tilt_ / sum_),
            static_cast<float>(lr / (1 - std::pow(kBeta1, count))),
            static_cast<float>(1 / std::sqrt(1 - std::pow(kBeta2, count)))};
  }

  // Far below the largest logit, second moments are below 2^-126. They may become 0 beside much
  // larger ones, as long as no logits become equal to the largest by that.
  bool may_flush(const Step& step) const {
    const float of_token = step.weight * step.mean;
    const float second = static_cast<float>(1 - kBeta2) * of_token * of_token;
    return std::max(second_, second) >= 0x1p-100f && std::fabs(max_) >= 0x1p-100f;
  }

  int64_t first_of_largest() const {
    for (int64_t chunk = 0; chunk < chunks_; ++chunk) {
      if (now()[chunk].max != max_) continue;
      for (int64_t i = chunk * kChunk;; ++i) {
        if (row_.y(i) == max_) return i;
      }
    }
    return 0;
  }

  // Whether the argmax is no longer `token`, to be seen without reading other threads' chunks.
  bool leads_another(int64_t token) const {
    const int64_t own = token / kChunk;
    if (now()[own].token != max_ || now()[own].tied) return true;
    return std::any_of(now(), now() + own, [&](const Partial& p) { return p.max == max_; });
  }

  // What a NaN or an infinity becomes in one step: the softmax of the row is NaN.
  void spoil() {
    const int64_t begin = team_.begin(chunks_) * kChunk;
    const int64_t end = std::min(team_.end(chunks_) * kChunk, call_.vocab);
    for (float* array : {row_.z, row_.exp_avg, row_.exp_avg_sq}) {
      std::fill(array + begin, array + std::max(begin, end), kNaN);
    }
    unclean_ = true;
    team_.meet();
  }

  const Call& call_;
  const Passes& passes_;
  const Row row_;
  Partial* const partials_[2];
  const Team team_;
  const int64_t chunks_;
  int64_t turn_ = 0;
  // Of the last pass.
  double sum_ = 0, tilt_ = 0;
  float max_ = -kInfinity, second_ = 0;
  bool unclean_ = false;
};

// A row with what stands on its desk: its noise, if there is any, is drawn there. The threads have
// met when it is needed elsewhere.
void set_desk(const Call& call, const Passes& passes, int64_t index, const Desk& desk, Team team,
              Row& row) {
  row.e = desk.e;
  if (!desk.noise) return;
  row.noise = desk.noise;
  const int64_t chunks = call.chunks();
  const int64_t begin = team.begin(chunks) * kChunk;
  const int64_t end = std::min(team.end(chunks) * kChunk, call.vocab);
  if (begin >= end) return;
  passes.noise(call.noise_seed[index], call.noise_position[index], begin, end - begin,
               desk.noise + begin);
}

// Steps of a row in its own place, and what they came to.
void descend(const Call& call, const Passes& passes, int64_t index, int64_t most, const Desk& desk,
             Team team) {
  Row row = call.row(index);
  set_desk(call, passes, index, desk, team, row);
  const Outcome outcome = Descent(call, passes, row, desk, team).run(index, most);
  team.meet();  // the others still read call.step
  if (team.rank > 0) return;
  call.step[index] += outcome.taken;
  call.token[index] = outcome.token;
  call.flipped[index] = outcome.flipped;
}

// Steps of a row on a copy: how many until its token moves, or `most`.
int64_t steps_to_flip(const Call& call, const Passes& passes, int64_t index, int64_t most,
                      const Desk& desk, Team team) {
  Row row = call.row(index);
  set_desk(call, passes, index, desk, team, row);
  const int64_t chunks = call.chunks(), begin = team.begin(chunks) * kChunk;
  const int64_t end = std::max(begin, std::min(team.end(chunks) * kChunk, call.vocab));
  float* copy = desk.copy;
  for (float** array : {&row.z, &row.exp_avg, &row.exp_avg_sq}) {
    std::copy(*array + begin, *array + end, copy + begin);
    *array = copy;
    copy += call.vocab;
  }
  const Outcome outcome = Descent(call, passes, row, desk, team).run(index, most);
  return outcome.flipped ? outcome.taken : std::numeric_limits<int64_t>::max();
}

// -- the rows
// -----------------------------------------------------------------------------------------

// Which rows stop together: sorted by group, each row's leader is the first of its group.
struct Groups {
  int64_t* order;     // [rows]
  int64_t* leader;    // [rows]
  int64_t* earliest;  // [rows], of a leader: after how many steps its group's first token moves

  void sort(const Call& call) {
    for (int64_t row = 0; row < call.rows; ++row) order[row] = row;
    std::sort(order, order + call.rows, [&](int64_t a, int64_t b) {
      return call.group[a] != call.group[b] ? call.group[a] < call.group[b] : a < b;
    });
    for (int64_t n = 0; n < call.rows; ++n) {
      const int64_t row = order[n];
      const bool first = n == 0 || call.group[order[n - 1]] != call.group[row];
      leader[row] = first ? row : leader[order[n - 1]];
      earliest[row] = std::numeric_limits<int64_t>::max();
    }
    // From here on, whether a row has a group to wait for.
    for (int64_t n = 0; n < call.rows; ++n) {
      const bool before = n > 0 && leader[order[n - 1]] == leader[order[n]];
      const bool after = n + 1 < call.rows && leader[order[n + 1]] == leader[order[n]];
      if (!before && !after) leader[order[n]] = -1;
    }
  }
};

struct Layout {
  int threads;  // at most
  int sharing;  // threads that share a row; 1: each thread has rows of its own
  int desks;
  int64_t desk_bytes, bytes;  // bytes: 0 if they are too many

  Layout(int64_t rows, int64_t vocab, int64_t iters, bool noise, bool groups, int32_t asked) {
    threads = threads_for((Size(rows) * vocab * std::max<int64_t>(iters, 1)).or_most(),
                          kWorkPerThread, asked);
    const int64_t most = std::clamp<int64_t>(vocab / kTokensPerThread, 1, threads);
    sharing = most > rows ? static_cast<int>(most) : 1;
    desks =
        sharing > 1 ? 1 : static_cast<int>(std::min<int64_t>(threads, std::max<int64_t>(rows, 1)));
    const int64_t chunks = (vocab + kChunk - 1) / kChunk;
    desk_bytes = padded(2 * chunks * sizeof(Partial)) + padded(4 * vocab) +
                 (noise ? padded(4 * vocab) : 0) + (groups ? padded(12 * vocab) : 0);
    bytes = (kAlignment + Size(desks) * desk_bytes + Size(groups ? 3 * 8 : 0) * rows).or_zero();
  }
  static int64_t padded(int64_t size) { return (size + 63) / 64 * 64; }

  Desk desk(char* workspace, int index, int64_t vocab, bool noise, bool groups) const {
    char* at = workspace + index * desk_bytes;
    const int64_t chunks = (vocab + kChunk - 1) / kChunk;
    Desk desk{};
    desk.partials[0] = reinterpret_cast<Partial*>(at);
    desk.partials[1] = desk.partials[0] + chunks;
    at += padded(2 * chunks * sizeof(Partial));
    desk.e = reinterpret_cast<float*>(at);
    at += padded(4 * vocab);
    if (noise) {
      desk.noise = reinterpret_cast<float*>(at);
      at += padded(4 * vocab);
    }
    if (groups) desk.copy = reinterpret_cast<float*>(at);
    return desk;
  }
};

// Whether the arrays of a call have a size, so that a layout of its workspace can be made.
bool sizes_fit(int64_t rows, int64_t vocab, int64_t iters) {
  return fits({{rows, 1}}, 24) && fits({{vocab, 1}}, 64) && fits({{iters, 1}}, 8);
}

nabla_fast_status status_of(const Call& call, const Passes& passes, int64_t index) {
  const Row row = call.row(index);
  float max = -kInfinity;
  for (int64_t begin = 0; begin < call.vocab; begin += kChunk) {
    Partial partial;
    passes.survey(row.from(begin), std::min(kChunk, call.vocab - begin), partial);
    if (partial.unclean) {
      const auto is_nan = [](float z) { return std::isnan(z); };
      return std::any_of(row.z + begin, row.z + call.vocab, is_nan) ? NABLA_FAST_ROW_NAN
                                                                    : NABLA_FAST_ROW_INFINITE;
    }
    max = std::max(max, partial.max);
  }
  return max == -kInfinity ? NABLA_FAST_ROW_ALL_MASKED : NABLA_FAST_OK;
}

// Calls work(row, desk, team) for every row, on all threads that share it.
template <typename Work>
void each_row(const Call& call, const Layout& layout, char* workspace, const Work& work) {
  const bool noise = call.noise_seed, groups = call.group;
  if (layout.sharing > 1) {
    const Desk desk = layout.desk(workspace, 0, call.vocab, noise, groups);
#ifdef _OPENMP
  #pragma omp parallel num_threads(layout.sharing)
    {
      const Team team{omp_get_thread_num(), omp_get_num_threads()};
      for (int64_t row = 0; row < call.rows; ++row) {
        work(row, desk, team);
        team.meet();  // the desk is free again
      }
    }
#else
    for (int64_t row = 0; row < call.rows; ++row) work(row, desk, Team{0, 1});
#endif
    return;
  }
#pragma omp parallel for num_threads(layout.desks) schedule(dynamic) if (layout.desks > 1)
  for (int64_t row = 0; row < call.rows; ++row) {
#ifdef _OPENMP
    const int rank = omp_get_thread_num();
#else
    const int rank = 0;
#endif
    work(row, layout.desk(workspace, layout.desks > 1 ? rank : 0, call.vocab, noise, groups),
         Team{0, 1});
  }
}

nabla_fast_status run(const Call& call, nabla_fast_status* row_status, const Layout& layout,
                      char* workspace) {
  const Passes& plain = passes<false>();
  bool good = true;
#pragma omp parallel for num_threads(layout.threads) reduction(&& : good) if (layout.threads > 1)
  for (int64_t row = 0; row < call.rows; ++row) {
    row_status[row] = status_of(call, plain, row);
    good = good && row_status[row] == NABLA_FAST_OK;
  }
  if (!good) return NABLA_FAST_BAD_ROWS;

  const Passes& mine = call.noise_seed ? passes<true>() : plain;
  Groups groups{};
  if (call.group) {
    groups.order = reinterpret_cast<int64_t*>(workspace + layout.desks * layout.desk_bytes);
    groups.leader = groups.order + call.rows;
    groups.earliest = groups.leader + call.rows;
    groups.sort(call);
    each_row(call, layout, workspace, [&](int64_t row, const Desk& desk, Team team) {
      const int64_t leader = groups.leader[row];
      if (leader < 0) return;
      int64_t* earliest = &groups.earliest[leader];
      const int64_t so_far = __atomic_load_n(earliest, __ATOMIC_RELAXED);
      team.meet();  // all threads of a row must have read the same number
      const int64_t most = std::min(call.left(row), so_far);
      const int64_t steps = steps_to_flip(call, mine, row, most, desk, team);
      if (team.rank > 0) return;
#pragma omp critical(nabla_fast_dto_descent_earliest)
      if (steps < *earliest) __atomic_store_n(earliest, steps, __ATOMIC_RELAXED);
    });
  }
  each_row(call, layout, workspace, [&](int64_t row, const Desk& desk, Team team) {
    int64_t most = call.left(row);
    if (call.group && groups.leader[row] >= 0) {
      most = std::min(most, groups.earliest[groups.leader[row]]);
    }
    descend(call, mine, row, most, desk, team);
  });
  return NABLA_FAST_OK;
}

}  // namespace
}  // namespace nabla_fast::cpu

int64_t nabla_fast_dto_descent_workspace(int64_t rows, int64_t vocab, int64_t iters, int32_t noise,
                                         int32_t groups, int32_t num_threads) {
  using namespace nabla_fast::cpu;
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
  using namespace nabla_fast::cpu;
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
  for (int64_t row = 0; row < rows; ++row) {
    if (step[row] < 0 || (until && until[row] > iters)) return NABLA_FAST_INVALID_STEPS;
  }
  if (workspace_bytes < layout.bytes) return NABLA_FAST_WORKSPACE_TOO_SMALL;
  const Call call{z,
                  grad,
                  exp_avg,
                  exp_avg_sq,
                  step,
                  rows,
                  vocab,
                  z_stride,
                  grad_stride,
                  exp_avg_stride,
                  exp_avg_sq_stride,
                  schedule,
                  iters,
                  schedule_stride,
                  until,
                  group,
                  tau,
                  noise_seed,
                  noise_position,
                  token,
                  flipped};
  return run(call, row_status, layout, aligned(workspace));
}
