// nabla_fast_draw_tokens: the tokens that may be drawn, and the best of them with noise.
//
// Scores z / T are in double precision throughout; the largest logit of a block says whether it has
// to be looked at. Without filters one pass makes the random words of blocks, and noise of those
// whose words could make a token the best so far. With filters one pass lists the tokens that are
// among the k largest so far, of which those from the k-th largest on stay; what top-p drops is
// found by halving that list around one of its scores, as quickselect does, but by the mass below
// it. Few tokens are left, each with noise of its own.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <functional>
#include <limits>

#include "base/args.h"
#include "base/check.h"
#include "base/floats.h"
#include "base/isa.h"
#include "base/overlap.h"
#include "base/threads.h"
#include "nabla_fast.h"
#include "simd/bf16.h"
#include "simd/gumbel.h"
#include "simd/vec.h"
#include "softmax/row_status.h"

namespace nabla_fast::draws {
namespace {

constexpr double kMasked = -std::numeric_limits<double>::infinity();
// No noise is larger: that of the last word is -log(-log(1 - 2^-33)) = 22.88.
constexpr double kMostNoise = 23;
// Tokens that are passed over together where none of them is large enough.
constexpr int64_t kBlockTokens = 64;
// Tokens worth another thread.
constexpr int64_t kTokensPerThread = 1 << 14;

struct Candidate {
  double score;
  int64_t token;
  double share;  // exp(score - the largest), where there is a top-p
};

// What the noise of a row is a function of, beside the token.
struct NoiseKey {
  int64_t seed;
  uint32_t position, start, last;

  NoiseKey(const nabla_fast_draw_args& call, int64_t row)
      : seed(call.seed[row]),
        position(static_cast<uint32_t>(call.position[row])),
        start(static_cast<uint32_t>(call.start[row])),
        last(4 * static_cast<uint32_t>(call.visit[row]) + (call.redraw ? 2 : 1)) {}

  template <int W>
  NABLA_FAST_INLINE void words_from(int64_t token, typename WideTypes<W>::Words (&words)[4]) const {
    token_words<W>(seed, token, position, start, last, words);
  }
};

// Whether a word is at least `least`.
template <int W>
NABLA_FAST_INLINE bool any_from(const typename WideTypes<W>::Words (&words)[4], uint64_t least) {
  typename WideTypes<W>::Longs found = words[0] >= least;
  for (int word = 1; word < 4; ++word) found |= words[word] >= least;
  int64_t any = 0;
  for (int i = 0; i < W; ++i) any |= found[i];
  return any != 0;
}

double noise_of(const NoiseKey& key, int64_t token) {
  WideTypes<1>::Words words[4];
  key.words_from<1>(token / 4 * 4, words);
  return gumbel_of<1>(words[token % 4], 0x1p-32)[0];
}

// A row of logits as it is read: the largest logit so far, and whether one was NaN.
struct Seen {
  float max = -kInfinity;
  bool nan = false;
};

// Largest of `count` logits, NaN left out.
template <int W, typename T>
NABLA_FAST_INLINE float block_max(const T* logits, int64_t count, Seen& seen) {
  Floats<W> top = splat<W>(-kInfinity);
  auto nan = top != top;
  int64_t n = 0;
  for (; n + W <= count; n += W) {
    const Floats<W> z = load_fp32<W>(logits + n);
    nan |= z != z;
    top = z > top ? z : top;
  }
  float max = lane_max<W>(top);
  for (int lane = 0; lane < W; ++lane) seen.nan |= nan[lane] != 0;
  for (; n < count; ++n) {
    const float z = to_fp32(logits[n]);
    seen.nan |= z != z;
    max = z > max ? z : max;
  }
  seen.max = max > seen.max ? max : seen.max;
  return max;
}

// z / T; NaN counts as masked.
template <typename T>
NABLA_FAST_INLINE double score_of(T logit, double tau) {
  const double z = to_fp32(logit);
  return (z == z ? z : kMasked) / tau;
}

// The least word whose noise is above `least`, or one or two below it: 2^32 exp(-exp(-least)).
NABLA_FAST_INLINE uint64_t word_above(double least) {
  const double word = 0x1p32 * std::exp(-std::exp(1e-6 - least)) - 2;
  return word > 0 ? static_cast<uint64_t>(word) : 0;
}

// The first token whose score is largest with its noise.
template <int W, typename T>
NABLA_FAST_INLINE int64_t best_of_all(const T* logits, int64_t vocab, double tau,
                                      const NoiseKey& key, Seen& seen) {
  constexpr int64_t kBlock = 4 * W;
  alignas(64) double noise[4][W];
  double best = kMasked;
  int64_t token = 0;
  for (int64_t first = 0; first < vocab; first += kBlock) {
    const int64_t count = std::min(kBlock, vocab - first);
    const double top = static_cast<double>(block_max<W, T>(logits + first, count, seen)) / tau;
    if (!(top + kMostNoise > best)) continue;
    typename WideTypes<W>::Words words[4];
    key.template words_from<W>(first, words);
    if (!any_from<W>(words, word_above(best - top))) continue;
    for (int word = 0; word < 4; ++word) {
      const auto wide = gumbel_of<W>(words[word], 0x1p-32);
      for (int i = 0; i < W; ++i) noise[word][i] = wide[i];
    }
    for (int64_t n = 0; n < count; ++n) {
      const double score = score_of(logits[first + n], tau) + noise[n % 4][n / 4];
      if (score > best) {
        best = score;
        token = first + n;
      }
    }
  }
  return token;
}

// First token of the first block from `first` on whose largest score is at least `least`, or vocab.
template <int W, typename T>
NABLA_FAST_INLINE int64_t next_block(const T* logits, int64_t first, int64_t vocab, double tau,
                                     double least, Seen& seen) {
  for (; first < vocab; first += kBlockTokens) {
    const int64_t count = std::min(kBlockTokens, vocab - first);
    if (static_cast<double>(block_max<W, T>(logits + first, count, seen)) / tau >= least)
      return first;
  }
  return vocab;
}

NABLA_FAST_FOR_EACH_ISA(fp32_next_block, next_block<W, float>)
NABLA_FAST_FOR_EACH_ISA(bf16_next_block, next_block<W, uint16_t>)
NABLA_FAST_FOR_EACH_ISA(fp32_best_of_all, best_of_all<W, float>)
NABLA_FAST_FOR_EACH_ISA(bf16_best_of_all, best_of_all<W, uint16_t>)

// Scores of the k largest so far. heap: [k], the least of them first once there are k.
class Largest {
 public:
  Largest(double* heap, int64_t k) : heap_(heap), k_(k) {}

  double least() const { return k_ > 0 && held_ == k_ ? heap_[0] : kMasked; }

  void add(double score) {
    if (held_ == k_) {
      if (!(score > heap_[0])) return;
      std::pop_heap(heap_, heap_ + held_--, std::greater<double>());
    }
    heap_[held_++] = score;
    std::push_heap(heap_, heap_ + held_, std::greater<double>());
  }

 private:
  double* heap_;
  int64_t k_, held_ = 0;
};

// Tokens among the k largest and those that tie with the k-th, in their order, all of them where
// k is 0; returns how many. list: [vocab], heap: [k].
template <typename T, typename Next>
int64_t list_largest(Next* next_of, const T* logits, int64_t vocab, double tau, int64_t k,
                     Candidate* list, double* heap, Seen& seen) {
  Largest largest(heap, k);
  int64_t listed = 0;
  for (int64_t first = 0;; first += kBlockTokens) {
    first = next_of(logits, first, vocab, tau, largest.least(), seen);
    if (first >= vocab) break;
    const int64_t count = std::min(kBlockTokens, vocab - first);
    for (int64_t v = first; v < first + count; ++v) {
      const double score = score_of(logits[v], tau);
      if (!(score >= largest.least())) continue;
      list[listed++] = {score, v, 0};
      if (k > 0) largest.add(score);
    }
  }
  const double least = largest.least();
  const auto drops = [&](const Candidate& c) { return c.score < least; };
  return k > 0 ? std::remove_if(list, list + listed, drops) - list : listed;
}

// The least likely token that top-p leaves: of equal scores those from its index on stay. Reorders
// the list, of at least one token and a finite largest score.
Candidate first_to_stay(Candidate* list, int64_t count, double top_p) {
  const auto limit = static_cast<float>(1 - top_p);
  double top = kMasked, total = 0, below = 0;
  for (int64_t n = 0; n < count; ++n) top = std::max(top, list[n].score);
  for (int64_t n = 0; n < count; ++n) total += list[n].share = std::exp(list[n].score - top);
  const auto fits = [&](double mass) { return static_cast<float>(mass / total) <= limit; };
  // Of [low, high) it is not known what stays; below it lies a mass that fits.
  Candidate *low = list, *high = list + count;
  uint64_t place = 0;  // pseudo-random, so that no order of scores makes halves uneven for long
  for (;;) {
    place = place * 6364136223846793005u + 1442695040888963407u;
    const double value = low[(place >> 33) % static_cast<uint64_t>(high - low)].score;
    Candidate* const equal =
        std::partition(low, high, [&](const Candidate& c) { return c.score < value; });
    Candidate* const above =
        std::partition(equal, high, [&](const Candidate& c) { return c.score == value; });
    double mass = below;
    for (const Candidate* c = low; c < equal; ++c) mass += c->share;
    if (equal > low && !fits(mass)) {
      high = equal;
      continue;
    }
    const double share = equal->share;
    const int64_t ties = above - equal;
    if (fits(mass + static_cast<double>(ties) * share) && above < high) {
      below = mass + static_cast<double>(ties) * share;
      low = above;
      continue;
    }
    std::sort(equal, above,
              [](const Candidate& a, const Candidate& b) { return a.token < b.token; });
    int64_t dropped = 0;
    while (dropped + 1 < ties && fits(mass + static_cast<double>(dropped + 1) * share)) ++dropped;
    return equal[dropped];
  }
}

// top_k, or 0 where it drops nothing.
int64_t kept_of(const nabla_fast_draw_args& call) {
  return call.top_k < call.vocab ? call.top_k : 0;
}

// list: [vocab] candidates and [top_k] scores.
template <typename T, typename Next>
int64_t best_of_some(Next* next_of, const T* logits, const nabla_fast_draw_args& call,
                     const NoiseKey& key, Candidate* list, Seen& seen) {
  auto* const heap = reinterpret_cast<double*>(list + call.vocab);
  const int64_t count =
      list_largest(next_of, logits, call.vocab, call.tau, kept_of(call), list, heap, seen);
  if (softmax::row_status(seen.max, seen.nan) != NABLA_FAST_OK) return 0;
  Candidate first{kMasked, 0, 0};
  if (call.top_p < 1) first = first_to_stay(list, count, call.top_p);
  Candidate best{kMasked, call.vocab, 0};
  for (const Candidate* c = list; c < list + count; ++c) {
    if (c->score < first.score || (c->score == first.score && c->token < first.token)) continue;
    if (c->score + kMostNoise < best.score) continue;
    const double score = c->score + noise_of(key, c->token);
    if (score > best.score || (score == best.score && c->token < best.token))
      best = {score, c->token, 0};
  }
  return best.token;
}

bool filters(const nabla_fast_draw_args& call) { return kept_of(call) > 0 || call.top_p < 1; }

int threads_of(const nabla_fast_draw_args& call) {
  const int threads =
      threads_for((Size(call.rows) * call.vocab).or_most(), kTokensPerThread, call.num_threads);
  return static_cast<int>(std::min<int64_t>(threads, call.rows));
}

// Of the candidates of a thread's row and the scores of the k largest.
Size list_bytes(const nabla_fast_draw_args& call) {
  const Size scores = Size(kept_of(call)) * int64_t{sizeof(double)};
  return (Size(call.vocab) * int64_t{sizeof(Candidate)} + scores).rounded_up(kAlignment);
}

Size workspace_of(const nabla_fast_draw_args& call) {
  if (call.rows == 0) return 0;
  return Size(kAlignment) + (filters(call) ? list_bytes(call) * threads_of(call) : Size(0));
}

nabla_fast_status check(const nabla_fast_draw_args& call) {
  if (call.rows < 0 || call.vocab < 1) return NABLA_FAST_INVALID_SHAPE;
  if (!is_tau(call.tau)) return NABLA_FAST_INVALID_TAU;
  if (call.top_k < 0 || !(call.top_p > 0 && call.top_p <= 1)) return NABLA_FAST_INVALID_FILTER;
  if (call.rows == 0) return NABLA_FAST_OK;
  if (!fits({{call.rows, 1}}, sizeof(int64_t))) return NABLA_FAST_TOO_LARGE;
  if (!call.seed || !call.start || !call.visit || !call.position) return NABLA_FAST_INVALID_POINTER;
  return check_matrix(call.logits, call.rows, call.vocab);
}

template <typename T, typename Next, typename Best>
void draw_tokens(Next* next_of, Best* best_of, const nabla_fast_draw_args& call) {
  const auto* const logits = static_cast<const T*>(call.logits.data);
  const int64_t stride = stride_of(call.logits, call.rows);
  const int threads = threads_of(call);
  char* const memory = aligned(call.workspace);
  const int64_t bytes = list_bytes(call).or_zero();
#pragma omp parallel for schedule(dynamic) num_threads(threads) if (threads > 1)
  for (int64_t row = 0; row < call.rows; ++row) {
    const T* const z = logits + row * stride;
    const NoiseKey key(call, row);
    Seen seen;
    if (filters(call)) {
      auto* const list = reinterpret_cast<Candidate*>(memory + thread_rank() * bytes);
      call.token[row] = best_of_some(next_of, z, call, key, list, seen);
    } else {
      call.token[row] = best_of(z, call.vocab, call.tau, key, seen);
    }
    call.row_status[row] = softmax::row_status(seen.max, seen.nan);
    if (call.row_status[row] != NABLA_FAST_OK) call.token[row] = 0;
  }
}

}  // namespace
}  // namespace nabla_fast::draws

using namespace nabla_fast;
using namespace nabla_fast::draws;

int64_t nabla_fast_draw_tokens_workspace(const nabla_fast_draw_args* args) {
  return workspace_bytes(args, check, workspace_of);
}

nabla_fast_status nabla_fast_draw_tokens(const nabla_fast_draw_args* args) {
  nabla_fast_draw_args call;
  if (const auto refused = read_args(args, call)) return refused;
  if (const auto refused = check(call)) return refused;
  if (call.rows == 0) return NABLA_FAST_OK;
  if (!call.token || !call.row_status) return NABLA_FAST_INVALID_POINTER;
  const int64_t bytes = workspace_of(call).or_zero();
  if (const auto refused = check_workspace(call, bytes)) return refused;
  const bool overlap = any_overlap([&](auto& arrays) {
    arrays.writes(array_of(call.token, call.rows));
    arrays.writes(array_of(call.row_status, call.rows));
    arrays.writes(array_of_bytes(call.workspace, bytes));
    arrays.reads(array_of(call.logits, call.rows));
    arrays.reads(array_of(call.seed, call.rows));
    arrays.reads(array_of(call.start, call.rows));
    arrays.reads(array_of(call.visit, call.rows));
    arrays.reads(array_of(call.position, call.rows));
  });
  if (overlap) return NABLA_FAST_OVERLAP;
  if (call.logits.dtype == NABLA_FAST_FLOAT32)
    draw_tokens<float>(fp32_next_block.select(), fp32_best_of_all.select(), call);
  else
    draw_tokens<uint16_t>(bf16_next_block.select(), bf16_best_of_all.select(), call);
  return NABLA_FAST_OK;
}
