// nabla_fast_token_stats: one pass over the logits of each row.
//
// A row is cut into chunks of 1,024 tokens, and runs of 16 chunks make a segment: by position
// alone, never by thread. A chunk is read twice, the second time from the first-level cache: for
// its maximum, and for sums relative to the largest logit of the segment so far. That one rarely
// moves, so that the sums of chunks are mostly just added. Segments join into rows from left to
// right, on whatever thread they were computed.

#include "ops/token_stats.h"

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>

#include "base/args.h"
#include "base/floats.h"
#include "base/isa.h"
#include "base/prefetch.h"
#include "base/threads.h"
#include "nabla_fast.h"
#include "simd/bf16.h"
#include "simd/vec.h"
#include "softmax/row_softmax.h"
#include "softmax/token_sums.h"

namespace nabla_fast::stats {
namespace {

constexpr int kChunkTokens = 1024;
constexpr int64_t kStatsSegmentTokens = 16 * kChunkTokens;
// Segments whose results are held at once when several threads share a row.
constexpr int64_t kSharedSegments = 64;
// Tokens worth another thread.
constexpr int64_t kTokensPerThread = 2 * kStatsSegmentTokens;
// Vectors side by side, whose operations do not wait for each other.
constexpr int kVectorsAbreast = 4;
// Numbers added up in fp32 before their sum is added to one in double.
constexpr int kAddends = 16;
// Bytes from the block at work to the memory being prefetched.
constexpr int64_t kPrefetchBytes = 8192;

constexpr float masked_logit(const float*) { return -kInfinity; }
constexpr uint16_t masked_logit(const uint16_t*) { return kBf16MinusInfinity; }

// kVectorsAbreast vectors of logits.
template <int W>
NABLA_FAST_INLINE void load_abreast(const float* logits, Floats<W> (&z)[kVectorsAbreast]) {
#pragma GCC unroll 4
  for (int u = 0; u < kVectorsAbreast; ++u) z[u] = load<W>(logits + u * W);
}

// The same of bf16: each of the two in a word is a float once the other is masked out. The order of
// tokens in lanes does not matter.
template <int W>
NABLA_FAST_INLINE void load_abreast(const uint16_t* logits, Floats<W> (&z)[kVectorsAbreast]) {
  typedef uint32_t Stored __attribute__((vector_size(4 * W), aligned(2), may_alias));
#pragma GCC unroll 2
  for (int u = 0; u < kVectorsAbreast; u += 2) {
    const typename VecTypes<W>::Bits pairs = *reinterpret_cast<const Stored*>(logits + u * W);
    z[u] = lower_to_fp32<W>(pairs);
    z[u + 1] = upper_to_fp32<W>(pairs);
  }
}

// Largest logits so far by lanes, NaN left out.
template <int W>
struct LaneMax {
  Floats<W> max[kVectorsAbreast];

  NABLA_FAST_INLINE LaneMax() {
#pragma GCC unroll 4
    for (int u = 0; u < kVectorsAbreast; ++u) max[u] = splat<W>(-kInfinity);
  }
  // kVectorsAbreast vectors of logits.
  template <typename T>
  NABLA_FAST_INLINE void add(const T* logits) {
    Floats<W> z[kVectorsAbreast];
    load_abreast<W>(logits, z);
#pragma GCC unroll 4
    for (int u = 0; u < kVectorsAbreast; ++u) max[u] = z[u] > max[u] ? z[u] : max[u];
  }
  NABLA_FAST_INLINE float value() const {
    const Floats<W> left = max[0] > max[1] ? max[0] : max[1];
    const Floats<W> right = max[2] > max[3] ? max[2] : max[3];
    return lane_max<W>(left > right ? left : right);
  }
};

// TokenSums of segments so far, by lanes.
template <int W>
struct LaneSums {
  typedef double Doubles __attribute__((vector_size(8 * W)));
  Doubles sum_exp = {}, sum_d_exp = {};
};

// Adds n logits to the sums relative to `max`, which none of them exceeds; n a multiple of
// kVectorsAbreast * W, at most kAddends of them. kTop: some may be equal to it, and how many are is
// the result. Where one is NaN, so is a sum. Meanwhile as many logits from `next` on go to
// next_max.
template <int W, bool kTop, typename T>
NABLA_FAST_INLINE double add_block(const T* logits, const T* next, int n, float max,
                                   const softmax::Tau& tau, LaneSums<W>& sums,
                                   LaneMax<W>& next_max) {
  constexpr int kBytes = kVectorsAbreast * W * static_cast<int>(sizeof(T));
  Floats<W> sum_exp[kVectorsAbreast] = {}, sum_d_exp[kVectorsAbreast] = {}, z[kVectorsAbreast];
  Floats<W> at_max = {};
  Prefetcher prefetcher{reinterpret_cast<const char*>(logits) + kPrefetchBytes};
  for (int i = 0; i < n; i += kVectorsAbreast * W) {
    load_abreast<W>(logits + i, z);
    prefetcher.advance<kBytes>();
    next_max.add(next + i);
#pragma GCC unroll 4
    for (int u = 0; u < kVectorsAbreast; ++u) {
      const Floats<W> d = z[u] - max;
      const Mask<W> counts = above<W>(d, tau.lowest);
      const Floats<W> e = vec_exp2<W>(counts, d, tau.inverse_high, tau.inverse_low);
      sum_d_exp[u] = select<W>(counts, sum_d_exp[u] + d * e, sum_d_exp[u]);
      if (kTop) {
        const Mask<W> top = at_least<W>(d, 0.0f);
        at_max = select<W>(top, at_max + 1.0f, at_max);
        sum_exp[u] = select<W>(top, sum_exp[u], sum_exp[u] + e);
      } else {
        sum_exp[u] += e;
      }
    }
  }
  using Doubles = typename LaneSums<W>::Doubles;
  sums.sum_exp +=
      __builtin_convertvector((sum_exp[0] + sum_exp[1]) + (sum_exp[2] + sum_exp[3]), Doubles);
  sums.sum_d_exp += __builtin_convertvector(
      (sum_d_exp[0] + sum_d_exp[1]) + (sum_d_exp[2] + sum_d_exp[3]), Doubles);
  return kTop ? lane_sum<W>(at_max) : 0;
}

template <typename T>
bool has_nan(const T* logits, int64_t n) {
  return std::any_of(logits, logits + n, [](T z) { return std::isnan(to_fp32(z)); });
}

template <typename T>
NABLA_FAST_INLINE int first_equal(const T* logits, int n, float value) {
  int first = n;
#pragma omp simd reduction(min : first)
  for (int i = 0; i < n; ++i) {
    const int here = to_fp32(logits[i]) == value ? i : n;
    first = here < first ? here : first;
  }
  return first;
}

// logits: [n] of one segment, 1 <= n <= kStatsSegmentTokens; `offset` is the index of its first
// token in the row.
template <int W, typename T>
NABLA_FAST_INLINE softmax::TokenSums segment_sums(const T* logits, int64_t n, int64_t offset,
                                                  const softmax::Tau& tau) {
  constexpr int kTokensAbreast = kVectorsAbreast * W, kBlockTokens = kAddends * kTokensAbreast;
  alignas(64) T padded[kChunkTokens];
  softmax::TokenSums sums;
  LaneSums<W> lanes;
  LaneMax<W> next_max;
  int64_t top = 0;  // where the chunk with the maximum begins
  for (int64_t begin = 0; begin < n; begin += kChunkTokens) {
    const T* chunk = logits + begin;
    int size = kChunkTokens;
    if (n - begin < kChunkTokens) {
      const int whole = static_cast<int>(n - begin);
      size = (whole + kTokensAbreast - 1) / kTokensAbreast * kTokensAbreast;
      std::fill(std::copy(chunk, chunk + whole, padded), padded + size, masked_logit(chunk));
      chunk = padded;
    }
    if (begin == 0 || chunk == padded) {
      next_max = LaneMax<W>();
      for (int i = 0; i < size; i += kTokensAbreast) next_max.add(chunk + i);
    }
    const float max = next_max.value();
    next_max = LaneMax<W>();
    if (max > sums.max) {
      if (sums.max != -kInfinity) {
        const double gap = static_cast<double>(sums.max) - max;
        const double scale = softmax::rescale(sums.max, max, tau.value);
        lanes.sum_exp[0] += sums.at_max;
        lanes.sum_d_exp = scale * (lanes.sum_d_exp + gap * lanes.sum_exp);
        lanes.sum_exp *= scale;
      }
      sums.max = max;
      sums.at_max = 0;
      top = begin;
    }
    // The maximum of the next chunk is found in the same loop.
    const T* next = n - begin >= 2 * kChunkTokens ? chunk + kChunkTokens : chunk;
    if (sums.max == -kInfinity) {
      // All masked, or NaN.
      sums.nan = sums.nan || has_nan(chunk, size);
      for (int i = 0; i < size; i += kTokensAbreast) next_max.add(next + i);
      continue;
    }
    for (int i = 0; i < size; i += kBlockTokens) {
      const int block = std::min(kBlockTokens, size - i);
      if (max == sums.max) {
        sums.at_max += add_block<W, true>(chunk + i, next + i, block, max, tau, lanes, next_max);
      } else {
        add_block<W, false>(chunk + i, next + i, block, sums.max, tau, lanes, next_max);
      }
    }
  }
  for (int lane = 0; lane < W; ++lane) {
    sums.sum_exp += lanes.sum_exp[lane];
    sums.sum_d_exp += lanes.sum_d_exp[lane];
  }
  if (sums.nan || sums.max == kInfinity || std::isnan(sums.sum_d_exp)) {
    sums.nan = has_nan(logits, n);
    return sums;
  }
  if (sums.max == -kInfinity) return sums;
  const int size = static_cast<int>(std::min<int64_t>(kChunkTokens, n - top));
  sums.argmax = offset + top + first_equal(logits + top, size, sums.max);
  return sums;
}

NABLA_FAST_FOR_EACH_ISA(fp32_segment_sums, segment_sums<W, float>)
NABLA_FAST_FOR_EACH_ISA(bf16_segment_sums, segment_sums<W, uint16_t>)

// logits: [rows, vocab]; segment_of: segment_sums() of T at the level in force.
template <typename T, typename SegmentSums>
void token_stats(SegmentSums* segment_of, const T* logits, const nabla_fast_stats_args& call) {
  const int64_t rows = call.rows, vocab = call.vocab, row_stride = call.logits.stride;
  const softmax::Tau tau(call.tau);
  const auto segment = [&](int64_t row, int64_t index) {
    const int64_t begin = index * kStatsSegmentTokens;
    return segment_of(logits + row * row_stride + begin,
                      std::min(kStatsSegmentTokens, vocab - begin), begin, tau);
  };
  const int64_t segments = (vocab + kStatsSegmentTokens - 1) / kStatsSegmentTokens;
  const int threads =
      threads_for((Size(rows) * vocab).or_most(), kTokensPerThread, call.num_threads);

  if (rows >= 2 * threads || segments == 1 || threads == 1) {
#pragma omp parallel for num_threads(threads) schedule(dynamic) if (threads > 1)
    for (int64_t row = 0; row < rows; ++row) {
      softmax::TokenSums sums;
      for (int64_t s = 0; s < segments; ++s)
        sums = softmax::joined(sums, segment(row, s), tau.value);
      write_stats(call, row, sums, tau);
    }
    return;
  }

  // Too few rows to keep the threads busy: they share each row.
  softmax::TokenSums shared[kSharedSegments];
  for (int64_t row = 0; row < rows; ++row) {
    softmax::TokenSums sums;
    for (int64_t begin = 0; begin < segments; begin += kSharedSegments) {
      const int64_t end = std::min(segments, begin + kSharedSegments);
#pragma omp parallel for num_threads(threads) schedule(dynamic)
      for (int64_t s = begin; s < end; ++s) shared[s - begin] = segment(row, s);
      for (int64_t s = begin; s < end; ++s)
        sums = softmax::joined(sums, shared[s - begin], tau.value);
    }
    write_stats(call, row, sums, tau);
  }
}

}  // namespace
}  // namespace nabla_fast::stats

using namespace nabla_fast;
using namespace nabla_fast::stats;

nabla_fast_status nabla_fast_token_stats(const nabla_fast_stats_args* args) {
  nabla_fast_stats_args call;
  if (const auto refused = read_args(args, call)) return refused;
  if (const auto refused = check_stats(call)) return refused;
  if (call.rows == 0) return NABLA_FAST_OK;
  if (const auto refused = check_matrix(call.logits, call.rows, call.vocab)) return refused;
  if (const auto refused = check_results(call)) return refused;
  const bool overlap = any_overlap([&](auto& arrays) {
    list_results(call, arrays);
    arrays.reads(array_of(call.logits, call.rows));
  });
  if (overlap) return NABLA_FAST_OVERLAP;
  if (call.logits.dtype == NABLA_FAST_FLOAT32)
    token_stats(fp32_segment_sums.select(), static_cast<const float*>(call.logits.data), call);
  else
    token_stats(bf16_segment_sums.select(), static_cast<const uint16_t*>(call.logits.data), call);
  return NABLA_FAST_OK;
}
