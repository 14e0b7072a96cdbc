#include "softmax/logit_rows.h"

#include <algorithm>
#include <cmath>

#include "base/floats.h"
#include "base/isa.h"
#include "base/threads.h"
#include "simd/bf16.h"
#include "simd/gumbel.h"
#include "simd/vec.h"

namespace nabla_fast::softmax {
namespace {

// Tokens of a buffer, those of a part, and those worth another thread.
constexpr int kChunkTokens = 1024;
constexpr int64_t kPartTokens = 16 * kChunkTokens;
constexpr int64_t kTokensPerThread = int64_t{1} << 16;

template <int W>
struct Largest {
  Floats<W> max = splat<W>(-kInfinity);
  // A number, not a mask, which the compiler would take apart lane by lane.
  Floats<W> nonfinite = {};

  NABLA_FAST_INLINE void add(const float* y) {
    const Floats<W> x = load<W>(y), one = splat<W>(1.0f);
    max = x > max ? x : max;
    nonfinite = x <= kMaxFloat ? nonfinite : one;
  }
};

// The largest of n numbers, n a multiple of 16, and whether one is NaN or +inf.
template <int W>
NABLA_FAST_INLINE float largest(const float* y, int n, bool& nonfinite) {
  Largest<W> even, odd;
  int i = 0;
  for (; i + 2 * W <= n; i += 2 * W) {
    even.add(y + i);
    odd.add(y + i + W);
  }
  if (i < n) even.add(y + i);
  nonfinite = lane_max<W>(even.nonfinite + odd.nonfinite) > 0;
  return lane_max<W>(even.max > odd.max ? even.max : odd.max);
}

// y of n <= kChunkTokens tokens from `token` on, -inf behind them up to a multiple of 16: in place,
// or in y [kChunkTokens].
template <int W>
NABLA_FAST_INLINE const float* chunk_of(const gemm::Table& logits, int64_t row,
                                        const NoiseKeys& keys, int64_t token, int n, float* y) {
  if (logits.dtype == NABLA_FAST_FLOAT32 && !keys.seed && n == kChunkTokens)
    return static_cast<const float*>(logits.data) + row * logits.stride + token;
  gemm::copy_to_fp32<W>(logits, row, token, n, y);
  if (keys.seed) {
    alignas(64) float g[kChunkTokens];
    gumbel_noise<W / 2>(keys.seed[row], keys.position[row], token, n, g);
    for (int i = 0; i < n; ++i) y[i] += g[i];
  }
  for (int i = n; i < padded(n); ++i) y[i] = -kInfinity;
  return y;
}

template <int W>
NABLA_FAST_INLINE Top find_top_kernel(const gemm::Table& logits, int64_t row, const NoiseKeys& keys,
                                      int64_t begin, int64_t end) {
  alignas(64) float buffer[kChunkTokens];
  Top top;
  for (int64_t first = begin; first < end; first += kChunkTokens) {
    const int n = static_cast<int>(std::min<int64_t>(kChunkTokens, end - first));
    const float* y = chunk_of<W>(logits, row, keys, first, n, buffer);
    bool nonfinite = false;
    const float max = largest<W>(y, static_cast<int>(padded(n)), nonfinite);
    if (nonfinite)
      top.nan = top.nan || std::any_of(y, y + n, [](float x) { return std::isnan(x); });
    if (max > top.max) {
      top.max = max;
      top.token = first + (std::find(y, y + n, max) - y);
    }
  }
  return top;
}

template <int W>
NABLA_FAST_INLINE void differentiate(const float* y, int64_t n, const JacobianRow& of,
                                     float inverse, float* grad) {
  const Floats<W> zero = {};
  for (int64_t i = 0; i < n; i += W) {
    const Floats<W> x = (load<W>(y + i) - of.max) * inverse;
    const Floats<W> e = vec_exp_or_zero<W>(x);
    store<W>(grad + i, e > 0.0f ? e * of.weight * (load<W>(grad + i) - of.mean) : zero);
  }
}

template <int W>
NABLA_FAST_INLINE void differentiate_row_kernel(const gemm::Table& logits, int64_t row,
                                                const NoiseKeys& keys, int64_t begin, int64_t end,
                                                const JacobianRow& of, float inverse, float* grad) {
  alignas(64) float buffer[kChunkTokens];
  for (int64_t first = begin; first < end; first += kChunkTokens) {
    const int n = static_cast<int>(std::min<int64_t>(kChunkTokens, end - first)), whole = n / W * W;
    const float* y = chunk_of<W>(logits, row, keys, first, n, buffer);
    differentiate<W>(y, whole, of, inverse, grad + first);
    if (whole == n) continue;
    float rest[W] = {};
    std::copy(grad + first + whole, grad + first + n, rest);
    differentiate<W>(y + whole, W, of, inverse, rest);
    std::copy(rest, rest + n - whole, grad + first + whole);
  }
}

// -- for each instruction set ---------------------------------------------------------------------

NABLA_FAST_FOR_EACH_ISA(find_top, find_top_kernel<W>)
NABLA_FAST_FOR_EACH_ISA(differentiate_row, differentiate_row_kernel<W>)

// Calls work(row, begin, end) for parts of rows, by position alone.
template <typename Work>
void each_part(int64_t rows, int64_t vocab, int32_t num_threads, const Work& work) {
  const int64_t parts_of_row = top_parts(1, vocab), count = rows * parts_of_row;
  const int threads = threads_for(count * kPartTokens, kTokensPerThread, num_threads);
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1)
  for (int64_t n = 0; n < count; ++n) {
    const int64_t begin = n % parts_of_row * kPartTokens;
    work(n / parts_of_row, begin, std::min(vocab, begin + kPartTokens));
  }
}

}  // namespace

int64_t top_parts(int64_t rows, int64_t vocab) {
  return rows * ((vocab + kPartTokens - 1) / kPartTokens);
}

void tops_of_rows(const gemm::Table& logits, int64_t rows, int64_t vocab, const NoiseKeys& keys,
                  int32_t num_threads, Top* parts, Top* tops) {
  const int64_t parts_of_row = top_parts(1, vocab);
  each_part(rows, vocab, num_threads, [&](int64_t row, int64_t begin, int64_t end) {
    parts[row * parts_of_row + begin / kPartTokens] = find_top(logits, row, keys, begin, end);
  });
  for (int64_t row = 0; row < rows; ++row) {
    tops[row] = Top{};
    for (int64_t part = 0; part < parts_of_row; ++part)
      tops[row].join(parts[row * parts_of_row + part]);
  }
}

void jacobian_of_rows(const gemm::Table& logits, int64_t rows, int64_t vocab, const NoiseKeys& keys,
                      const JacobianRow* of, double tau, float* grad, int64_t grad_stride,
                      int32_t num_threads) {
  const auto inverse = static_cast<float>(1 / tau);
  each_part(rows, vocab, num_threads, [&](int64_t row, int64_t begin, int64_t end) {
    differentiate_row(logits, row, keys, begin, end, of[row], inverse, grad + row * grad_stride);
  });
}

}  // namespace nabla_fast::softmax
