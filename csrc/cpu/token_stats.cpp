// nabla_fast_token_stats: one pass over the logits of each row.
//
// A row is cut into chunks of 1,024 tokens, and runs of 16 chunks make a segment: by position
// alone, never by thread. A chunk is copied into a buffer, which widens bf16 and finds the maximum,
// and summed from there. Chunks join into segments and segments into rows from left to right,
// whoever computed them.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>

#include "isa.h"
#include "nabla_fast.h"
#include "threads.h"
#include "vec_exp.h"

namespace nabla_fast::cpu {
namespace {

constexpr int kChunk = 1024;
constexpr int64_t kSegment = 16 * kChunk;
// Segments of a row whose results are held at once when several threads share the row.
constexpr int64_t kSharedSegments = 64;
// Less work than this is not worth waking a thread for.
constexpr int64_t kTokensPerThread = 2 * kSegment;
// Tokens of a chunk that are summed in fp32, in 16 lanes whatever the instruction set; a chunk is
// padded with masked tokens to a multiple of it.
constexpr int kBlock = 128;
constexpr int kLanes = 16;

constexpr float kInfinity = std::numeric_limits<float>::infinity();
constexpr float kMaxFloat = std::numeric_limits<float>::max();

struct Tau {
  explicit Tau(double tau)
      : value(tau),
        inverse_high(static_cast<float>(1 / tau)),
        inverse_low(static_cast<float>(1 / tau - inverse_high)),
        lowest(static_cast<float>(-87 * tau)) {}
  double value;
  // 1 / tau in two parts: the rounding of one float would be the same for all tokens, and not
  // average out over them.
  float inverse_high;
  float inverse_low;
  // Tokens whose logit lies this far below the maximum are left out: exp(-87) < 2^-125.
  float lowest;
};

// Of the tokens of a chunk, a segment or a row, with x_v = (logits_v - max) / tau. Tokens at the
// maximum are counted apart: added to 1, a sum below 2^-24 would be lost, and with it the entropy
// of a peaked row.
struct Sums {
  float max = -kInfinity;
  nabla_fast_status status = NABLA_FAST_OK;
  int64_t argmax = -1;
  double at_max = 0;     // how many tokens are at the maximum
  double sum_exp = 0;    // sum of exp(x_v) over the others
  double sum_x_exp = 0;  // sum of x_v exp(x_v)
};

// `sums` as seen from a maximum that is higher by -shift * tau, shift <= 0.
Sums lowered(const Sums& sums, double shift) {
  const double scale = std::exp(shift);
  const double total = sums.at_max + sums.sum_exp;
  Sums result = sums;
  result.at_max = 0;
  result.sum_exp = scale * total;
  result.sum_x_exp = scale * (sums.sum_x_exp + shift * total);
  return result;
}

// The sums of two neighbours; `right` holds the tokens with the higher indices.
Sums joined(const Sums& left, const Sums& right, double tau) {
  if (left.status != NABLA_FAST_OK || right.status != NABLA_FAST_OK) {
    Sums result;
    const bool nan = left.status == NABLA_FAST_ROW_NAN || right.status == NABLA_FAST_ROW_NAN;
    result.status = nan ? NABLA_FAST_ROW_NAN : NABLA_FAST_ROW_INFINITE;
    return result;
  }
  if (right.max == -kInfinity) return left;
  if (left.max == -kInfinity) return right;
  const double shift = (static_cast<double>(left.max) - right.max) / tau;
  Sums result = shift < 0 ? right : left;
  const Sums other = shift < 0 ? lowered(left, shift) : shift > 0 ? lowered(right, -shift) : right;
  result.at_max += other.at_max;
  result.sum_exp += other.sum_exp;
  result.sum_x_exp += other.sum_x_exp;
  return result;
}

NABLA_FAST_INLINE float to_float(float x) { return x; }
NABLA_FAST_INLINE float to_float(uint16_t bf16) {
  return bits_float(static_cast<int32_t>(static_cast<uint32_t>(bf16) << 16));
}

nabla_fast_status status_of(const float* z, int n) {
  const bool nan = std::any_of(z, z + n, [](float value) { return std::isnan(value); });
  return nan ? NABLA_FAST_ROW_NAN : NABLA_FAST_ROW_INFINITE;
}

// logits: [n] of one chunk, 1 <= n <= kChunk; z: kChunk floats to work in, aligned to a vector.
template <typename T>
NABLA_FAST_INLINE Sums chunk_sums(const T* logits, int n, const Tau& tau, float* z) {
  Sums sums;
  float max = -kInfinity;
  int bad = 0;
#pragma omp simd aligned(z : 64) reduction(max : max) reduction(| : bad)
  for (int i = 0; i < n; ++i) {
    const float value = to_float(logits[i]);
    z[i] = value;
    max = value > max ? value : max;
    bad |= !(value <= kMaxFloat);
  }
  if (bad) {
    sums.status = status_of(z, n);
    return sums;
  }
  // OpenMP lets a maximum start from the lowest finite number, as clang does.
  if (!(max > -kMaxFloat)) max = *std::max_element(z, z + n);
  if (max == -kInfinity) return sums;

  std::fill(z + n, z + (n + kBlock - 1) / kBlock * kBlock, -kInfinity);
  sums.max = max;
  double at_max[kLanes] = {}, sum_exp[kLanes] = {}, sum_x_exp[kLanes] = {};
  for (int begin = 0; begin < n; begin += kBlock) {
    const float* block = z + begin;
#pragma omp simd aligned(block : 64)
    for (int64_t lane = 0; lane < kLanes; ++lane) {
      float block_at_max = 0, block_sum_exp = 0, block_sum_x_exp = 0;
      for (int64_t i = 0; i < kBlock; i += kLanes) {
        const float below = block[i + lane] - max;
        const bool counts = (below > tau.lowest) & (below < 0);
        const float bounded = below > tau.lowest ? below : tau.lowest;
        const float x = bounded * tau.inverse_low + bounded * tau.inverse_high;
        const float e = counts ? vec_exp_normal(x) : 0.0f;
        block_at_max += below < 0 ? 0.0f : 1.0f;
        block_sum_exp += e;
        block_sum_x_exp += x * e;
      }
      at_max[lane] += block_at_max;
      sum_exp[lane] += block_sum_exp;
      sum_x_exp[lane] += block_sum_x_exp;
    }
  }
  for (int lane = 0; lane < kLanes; ++lane) {
    sums.at_max += at_max[lane];
    sums.sum_exp += sum_exp[lane];
    sums.sum_x_exp += sum_x_exp[lane];
  }
  return sums;
}

NABLA_FAST_INLINE int first_equal(const float* z, int n, float value) {
  int first = n;
#pragma omp simd aligned(z : 64) reduction(min : first)
  for (int i = 0; i < n; ++i) {
    const int here = z[i] == value ? i : n;
    first = here < first ? here : first;
  }
  return first;
}

// logits: [n] of one segment, 1 <= n <= kSegment; `offset` is the index of its first token in the
// row.
template <typename T>
NABLA_FAST_INLINE Sums segment_sums(const T* logits, int64_t n, int64_t offset, const Tau& tau) {
  alignas(64) float z[kChunk];
  Sums sums;
  for (int64_t begin = 0; begin < n; begin += kChunk) {
    const int size = static_cast<int>(std::min<int64_t>(kChunk, n - begin));
    Sums chunk = chunk_sums(logits + begin, size, tau, z);
    if (chunk.max > sums.max) chunk.argmax = offset + begin + first_equal(z, size, chunk.max);
    sums = joined(sums, chunk, tau.value);
  }
  return sums;
}

template <typename T>
Sums segment_baseline(const T* logits, int64_t n, int64_t offset, const Tau& tau) {
  return segment_sums(logits, n, offset, tau);
}

template <typename T>
NABLA_FAST_TARGET_AVX2 Sums segment_avx2(const T* logits, int64_t n, int64_t offset,
                                         const Tau& tau) {
  return segment_sums(logits, n, offset, tau);
}

template <typename T>
NABLA_FAST_TARGET_AVX512 Sums segment_avx512(const T* logits, int64_t n, int64_t offset,
                                             const Tau& tau) {
  return segment_sums(logits, n, offset, tau);
}

// Where the results of a call go: each [rows].
struct Outputs {
  float* logsumexp;
  float* confidence;
  float* entropy;
  int64_t* argmax;
  nabla_fast_status* status;

  void write(int64_t row, const Sums& sums, const Tau& tau) const {
    status[row] = sums.status != NABLA_FAST_OK ? sums.status
                  : sums.max == -kInfinity     ? NABLA_FAST_ROW_ALL_MASKED
                                               : NABLA_FAST_OK;
    if (status[row] != NABLA_FAST_OK) {
      logsumexp[row] = confidence[row] = entropy[row] = std::numeric_limits<float>::quiet_NaN();
      argmax[row] = -1;
      return;
    }
    const double total = sums.at_max + sums.sum_exp;
    const double log_total = std::log(sums.at_max) + std::log1p(sums.sum_exp / sums.at_max);
    logsumexp[row] = static_cast<float>(sums.max / tau.value + log_total);
    confidence[row] = static_cast<float>(1 / total);
    entropy[row] = static_cast<float>(log_total - sums.sum_x_exp / total);
    argmax[row] = sums.argmax;
  }
};

// logits: [rows, vocab]
template <typename T>
void token_stats(const T* logits, int64_t rows, int64_t vocab, int64_t row_stride, const Tau& tau,
                 const Outputs& outputs, int32_t num_threads) {
  const auto segment_of = select_isa(segment_baseline<T>, segment_avx2<T>, segment_avx512<T>);
  const auto segment = [=](int64_t row, int64_t index) {
    const int64_t begin = index * kSegment;
    return segment_of(logits + row * row_stride + begin, std::min(kSegment, vocab - begin), begin,
                      tau);
  };
  const int64_t segments = (vocab + kSegment - 1) / kSegment;
  const int threads = threads_for(rows * vocab, kTokensPerThread, num_threads);

  if (rows >= 2 * threads || segments == 1 || threads == 1) {
#pragma omp parallel for num_threads(threads) schedule(dynamic) if (threads > 1)
    for (int64_t row = 0; row < rows; ++row) {
      Sums sums;
      for (int64_t s = 0; s < segments; ++s) sums = joined(sums, segment(row, s), tau.value);
      outputs.write(row, sums, tau);
    }
    return;
  }

  // Too few rows to keep the threads busy: they share each row.
  Sums shared[kSharedSegments];
  for (int64_t row = 0; row < rows; ++row) {
    Sums sums;
    for (int64_t begin = 0; begin < segments; begin += kSharedSegments) {
      const int64_t end = std::min(segments, begin + kSharedSegments);
#pragma omp parallel for num_threads(threads) schedule(dynamic)
      for (int64_t s = begin; s < end; ++s) shared[s - begin] = segment(row, s);
      for (int64_t s = begin; s < end; ++s) sums = joined(sums, shared[s - begin], tau.value);
    }
    outputs.write(row, sums, tau);
  }
}

}  // namespace
}  // namespace nabla_fast::cpu

nabla_fast_status nabla_fast_token_stats(const void* logits, nabla_fast_dtype dtype, int64_t rows,
                                         int64_t vocab, int64_t row_stride, double tau,
                                         float* logsumexp, float* confidence, float* entropy,
                                         int64_t* argmax, nabla_fast_status* row_status,
                                         int32_t num_threads) {
  using namespace nabla_fast::cpu;
  if (rows < 0 || vocab < 1) return NABLA_FAST_INVALID_SHAPE;
  if (!(tau >= 0x1p-64 && tau <= 0x1p64)) return NABLA_FAST_INVALID_TAU;
  if (dtype != NABLA_FAST_FLOAT32 && dtype != NABLA_FAST_BFLOAT16) return NABLA_FAST_UNKNOWN_DTYPE;
  if (rows == 0) return NABLA_FAST_OK;
  if (!logits || !logsumexp || !confidence || !entropy || !argmax || !row_status) {
    return NABLA_FAST_INVALID_POINTER;
  }
  const Outputs outputs{logsumexp, confidence, entropy, argmax, row_status};
  if (dtype == NABLA_FAST_FLOAT32) {
    token_stats(static_cast<const float*>(logits), rows, vocab, row_stride, Tau(tau), outputs,
                num_threads);
  } else {
    token_stats(static_cast<const uint16_t*>(logits), rows, vocab, row_stride, Tau(tau), outputs,
                num_threads);
  }
  return NABLA_FAST_OK;
}
