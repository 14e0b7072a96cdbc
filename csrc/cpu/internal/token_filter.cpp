#include "internal/token_filter.h"

#include <algorithm>
#include <cmath>
#include <functional>
#include <limits>

#include "base/isa.h"

namespace nabla_fast::internal {
namespace {

constexpr int64_t kScoreTokens = 64;

// Scores of a block and the largest of them.
template <typename T>
NABLA_FAST_INLINE T score_block(const T* logits, int64_t count, T temperature, T* scores) {
  T top = -std::numeric_limits<T>::infinity();
  for (int64_t n = 0; n < count; ++n) {
    scores[n] = logits[n] / temperature;
    top = scores[n] > top ? scores[n] : top;
  }
  return top;
}

NABLA_FAST_FOR_EACH_ISA(score_block_fp32, score_block<float>)
double score_block_fp64(const double* logits, int64_t count, double temperature, double* scores) {
  return score_block(logits, count, temperature, scores);
}

auto* block_of(float) { return score_block_fp32.select(); }
auto* block_of(double) { return &score_block_fp64; }

// probabilities = softmax of the `count` scores that stand there; dropped ones are -inf.
template <typename T>
void softmax(T* scores, int64_t count) {
  T top = *std::max_element(scores, scores + count), sum = 0;
  for (int64_t n = 0; n < count; ++n) sum += scores[n] = std::exp(scores[n] - top);
  for (int64_t n = 0; n < count; ++n) scores[n] /= sum;
}

}  // namespace

template <typename T>
int64_t filter_tokens(const T* logits, int64_t vocab, double temperature, int64_t top_k,
                      double top_p, int64_t* tokens, T* probabilities, int64_t capacity) {
  constexpr T kDropped = -std::numeric_limits<T>::infinity();
  for (int64_t n = 0; n < vocab; ++n)
    if (logits[n] != logits[n]) return -1;  // no order to sort by
  auto block_scores = block_of(T{});
  T by = static_cast<T>(temperature), scores[kScoreTokens];
  // The k largest scores so far, in a heap whose first is the least.
  T* heap = probabilities;
  int64_t held = 0;
  for (int64_t first = 0; first < vocab; first += kScoreTokens) {
    int64_t count = std::min(kScoreTokens, vocab - first);
    T top = block_scores(logits + first, count, by, scores);
    if (held == top_k && !(top > heap[0])) continue;
    for (int64_t n = 0; n < count; ++n) {
      if (held < top_k) {
        heap[held++] = scores[n];
        std::push_heap(heap, heap + held, std::greater<T>());
      } else if (scores[n] > heap[0]) {
        std::pop_heap(heap, heap + held, std::greater<T>());
        heap[held - 1] = scores[n];
        std::push_heap(heap, heap + held, std::greater<T>());
      }
    }
  }
  T least = heap[0];
  int64_t kept = 0;
  for (int64_t first = 0; first < vocab; first += kScoreTokens) {
    int64_t count = std::min(kScoreTokens, vocab - first);
    if (block_scores(logits + first, count, by, scores) < least) continue;
    for (int64_t n = 0; n < count; ++n) {
      if (scores[n] < least) continue;
      if (kept == capacity) return -1;
      tokens[kept] = first + n;
      probabilities[kept++] = scores[n];
    }
  }
  if (top_p < 1) {
    // Positions by ascending score, equal ones in their order, in the room behind the tokens.
    int64_t* order = tokens + capacity;
    for (int64_t n = 0; n < kept; ++n) order[n] = n;
    std::sort(order, order + kept, [&](int64_t a, int64_t b) {
      return probabilities[a] < probabilities[b] || (probabilities[a] == probabilities[b] && a < b);
    });
    T top = probabilities[order[kept - 1]];
    double sum = 0, mass = 0;
    for (int64_t n = 0; n < kept; ++n) sum += std::exp(probabilities[order[n]] - top);
    T limit = static_cast<T>(1 - top_p);
    for (int64_t n = 0; n + 1 < kept; ++n) {
      T& score = probabilities[order[n]];
      mass += static_cast<T>(std::exp(score - top) / sum);
      if (!(static_cast<T>(mass) <= limit)) break;
      score = kDropped;
    }
  }
  softmax(probabilities, kept);
  return kept;
}

template int64_t filter_tokens(const float*, int64_t, double, int64_t, double, int64_t*, float*,
                               int64_t);
template int64_t filter_tokens(const double*, int64_t, double, int64_t, double, int64_t*, double*,
                               int64_t);

}  // namespace nabla_fast::internal
