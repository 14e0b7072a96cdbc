// nabla_fast_dto_descent: one pass over a row's four arrays for each step.
//
// A step needs S = sum of exp((y - M) / tau) and T = sum of exp((y - M) / tau) (G - G[token]) over
// the row before it can move a logit, y being z plus its noise. The pass that takes a step adds up
// the S and T of the next: M stays the same as long as the largest y is near it, and G[token] as
// long as the row descends, since it stops when its token changes.
//
// The exponentials are kept in the workspace for the next step: reading one costs less than
// computing it again.
//
// A row is cut into chunks of 1,024 tokens, by position alone. A chunk's sums are taken in fp32
// lanes and joined in double from left to right, on whatever thread they were taken.

#include "ops/dto_descent.h"

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>

#include "base/check.h"
#include "base/floats.h"
#include "base/flush.h"
#include "base/isa.h"
#include "base/threads.h"
#include "nabla_fast.h"
#include "ops/dto_descent_chunks.h"
#include "softmax/row_status.h"
#include "softmax/tau.h"

namespace nabla_fast::descent {
namespace {

// Tokens times steps worth another thread, and tokens of a row worth another one: threads of a row
// wait for each other after every step.
constexpr int64_t kWorkPerThread = int64_t{1} << 17;
constexpr int64_t kTokensPerThread = int64_t{1} << 15;

// Distance that the largest y / tau may move before the sums are taken relative to it anew.
constexpr double kDrift = 8;

// -- a row ----------------------------------------------------------------------------------------

int64_t chunks_of(int64_t vocab) { return (vocab + kChunkTokens - 1) / kChunkTokens; }

Row row_of(const Call& call, int64_t row) {
  return {call.parameter_of(row),  call.grad_of(row), call.exp_avg_of(row),
          call.exp_avg_sq_of(row), nullptr,           nullptr};
}

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
  Descent(const Call& call, const ChunkPasses& passes, const Row& row, const Scratch& scratch,
          ThreadGroup threads)
      : call_(call),
        passes_(passes),
        row_(row),
        partials_{scratch.partials[0], scratch.partials[1]},
        threads_(threads),
        chunks_(chunks_of(call.vocab)) {}

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
  // row's totals. ChunkPasses go up and down in turn: each begins with the chunks still in the
  // caches.
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
            static_cast<float>(weighted_grad_sum_ / sum_ * weight), call_.rate(index, taken)};
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
  const ChunkPasses& passes_;
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
  const int64_t chunks = chunks_of(call.vocab);
  const int64_t begin = threads.begin(chunks) * kChunkTokens;
  const int64_t end = std::min(threads.end(chunks) * kChunkTokens, call.vocab);
  if (begin >= end) return;
  draw_noise(call.noise_seed[index], call.noise_position[index], begin, end - begin,
             scratch.noise + begin);
}

// Steps of a row in place, and their outcome.
void descend(const Call& call, const ChunkPasses& passes, int64_t index, int64_t most,
             const Scratch& scratch, ThreadGroup threads) {
  Row row = row_of(call, index);
  prepare_scratch(call, index, scratch, threads, row);
  const Outcome outcome = Descent(call, passes, row, scratch, threads).run(index, most);
  threads.barrier();  // the others still read the steps taken
  if (threads.rank > 0) return;
  call.step[index] += outcome.taken;
  call.token[index] = outcome.token;
  call.flipped[index] = outcome.flipped;
}

// Steps of a copy of a row until its token moves; the largest number if `most` do not move it.
int64_t steps_to_flip(const Call& call, const ChunkPasses& passes, int64_t index, int64_t most,
                      const Scratch& scratch, ThreadGroup threads) {
  Row row = row_of(call, index);
  prepare_scratch(call, index, scratch, threads, row);
  const int64_t chunks = chunks_of(call.vocab), begin = threads.begin(chunks) * kChunkTokens;
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

  explicit Layout(const nabla_fast_descent_args& call) {
    const int64_t rows = call.rows, vocab = call.vocab;
    const bool noise = call.noise_seed, groups = waits(call);
    threads = threads_for((Size(rows) * vocab * std::max<int64_t>(call.iters, 1)).or_most(),
                          kWorkPerThread, call.num_threads);
    const int64_t most = std::clamp<int64_t>(vocab / kTokensPerThread, 1, threads);
    sharing = most > rows ? static_cast<int>(most) : 1;
    scratches =
        sharing > 1 ? 1 : static_cast<int>(std::min<int64_t>(threads, std::max<int64_t>(rows, 1)));
    const int64_t chunks = chunks_of(vocab);
    scratch_bytes = whole_lines(2 * chunks * sizeof(ChunkSums)) + whole_lines(4 * vocab) +
                    (noise ? whole_lines(4 * vocab) : 0) + (groups ? whole_lines(12 * vocab) : 0);
    bytes =
        (kAlignment + Size(scratches) * scratch_bytes + Size(groups ? 3 * 8 : 0) * rows).or_zero();
  }
  static int64_t whole_lines(int64_t size) { return (size + 63) / 64 * 64; }

  Scratch scratch(const Call& call, char* memory, int index) const {
    char* at = memory + index * scratch_bytes;
    const int64_t vocab = call.vocab, chunks = chunks_of(vocab);
    Scratch scratch{};
    scratch.partials[0] = reinterpret_cast<ChunkSums*>(at);
    scratch.partials[1] = scratch.partials[0] + chunks;
    at += whole_lines(2 * chunks * sizeof(ChunkSums));
    scratch.e = reinterpret_cast<float*>(at);
    at += whole_lines(4 * vocab);
    if (call.noise_seed) {
      scratch.noise = reinterpret_cast<float*>(at);
      at += whole_lines(4 * vocab);
    }
    if (call.group) scratch.copy = reinterpret_cast<float*>(at);
    return scratch;
  }
};

nabla_fast_status status_of(const Call& call, const ChunkPasses& passes, int64_t index) {
  const Row row = row_of(call, index);
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
void each_row(const Call& call, const Layout& layout, char* memory, const Work& work) {
  if (layout.sharing > 1) {
    const Scratch scratch = layout.scratch(call, memory, 0);
#ifdef _OPENMP
  #pragma omp parallel num_threads(layout.sharing)
    {
      const ThreadGroup threads{thread_rank(), thread_count()};
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
    const int scratch = layout.scratches > 1 ? thread_rank() : 0;
    work(row, layout.scratch(call, memory, scratch), ThreadGroup{0, 1});
  }
}

nabla_fast_status run(const Call& call, const Layout& layout, char* memory) {
  const nabla_fast_isa isa = nabla_fast_cpu_isa();
  const ChunkPasses plain(false, isa);
  bool good = true;
#pragma omp parallel for num_threads(layout.threads) reduction(&& : good) if (layout.threads > 1)
  for (int64_t row = 0; row < call.rows; ++row) {
    call.row_status[row] = status_of(call, plain, row);
    good = good && call.row_status[row] == NABLA_FAST_OK;
  }
  if (!good) return NABLA_FAST_BAD_ROWS;

  const ChunkPasses mine(call.noise_seed != nullptr, isa);
  StopGroups groups{};
  if (call.group) {
    groups.order = reinterpret_cast<int64_t*>(memory + layout.scratches * layout.scratch_bytes);
    groups.leader = groups.order + call.rows;
    groups.earliest = groups.leader + call.rows;
    groups.sort(call.group, call.rows);
    each_row(call, layout, memory, [&](int64_t row, const Scratch& scratch, ThreadGroup threads) {
      const int64_t leader = groups.leader[row];
      if (leader < 0) return;
      int64_t* earliest = &groups.earliest[leader];
      const int64_t so_far = __atomic_load_n(earliest, __ATOMIC_RELAXED);
      threads.barrier();  // all threads of a row must have read the same number
      const int64_t most = std::min(call.steps_left(row), so_far);
      const int64_t steps = steps_to_flip(call, mine, row, most, scratch, threads);
      if (threads.rank > 0) return;
#pragma omp critical(nabla_fast_dto_descent_earliest)
      if (steps < *earliest) __atomic_store_n(earliest, steps, __ATOMIC_RELAXED);
    });
  }
  each_row(call, layout, memory, [&](int64_t row, const Scratch& scratch, ThreadGroup threads) {
    int64_t most = call.steps_left(row);
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

int64_t nabla_fast_dto_descent_workspace(const nabla_fast_descent_args* args) {
  return workspace_bytes(args, check_inputs, [](const nabla_fast_descent_args& call) {
    return call.rows > 0 ? Layout(call).bytes : 0;
  });
}

nabla_fast_status nabla_fast_dto_descent(const nabla_fast_descent_args* args) {
  Call call;
  if (const auto refused = read_args<nabla_fast_descent_args>(args, call)) return refused;
  if (const auto refused = check_inputs(call)) return refused;
  if (call.rows == 0) return NABLA_FAST_OK;
  const Layout layout(call);
  if (const auto refused = check_outputs(call, call.vocab, nullptr, layout.bytes)) return refused;
  if (const auto refused = check_steps(call)) return refused;
  if (!waits(call)) call.group = nullptr;
  return run(call, layout, aligned(call.workspace));
}
