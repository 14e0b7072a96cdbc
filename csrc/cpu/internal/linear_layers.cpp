#include "internal/linear_layers.h"

#include <algorithm>
#include <cstdint>

#include "base/isa.h"
#include "base/threads.h"
#include "gemm/add_weighted_rows.h"
#include "gemm/dot_products.h"
#include "simd/fp16.h"

namespace nabla_fast::internal {
namespace {

// Multiplications worth another thread; reading a weight costs as much as those of some rows.
constexpr int64_t kProductsPerThread = 1 << 20;
constexpr int64_t kRowsWorthReading = 4;
// Rows of a weight that stay in a cache while all tokens pass over them, and columns beside them.
constexpr int64_t kWeightBlock = 128;
constexpr int64_t kBlockColumns = gemm::kColumnVectorsInRegisters<kLanes> * kLanes;
// Tokens of a suffix, padding among them, from which a block of a weight is transposed for all of
// them. Shorter ones are summed in the order of lm_logits.
constexpr int64_t kLongSuffix = 16;
// Tokens from which it pays to put a block's rows side by side for a backward.
constexpr int64_t kCopiedTokens = 8;

int threads_of(int64_t tokens, LinearShape shape, int32_t asked) {
  return threads_for((tokens + kRowsWorthReading) * shape.out * shape.in, kProductsPerThread,
                     asked);
}

// -- forward --------------------------------------------------------------------------------------

// Columns [first, last) of y[T, out] = x[T, in] weight^T.
template <int W, typename T>
NABLA_FAST_INLINE void short_part_kernel(const float* x, int64_t x_stride, int64_t tokens,
                                         const void* weight, int64_t in, float* y, int64_t y_stride,
                                         int64_t first, int64_t last) {
  const gemm::HeadProduct product{x, tokens, x_stride, weight, last, in, in};
  for (int64_t block = first; block < last; block += gemm::kTokensInL2)
    gemm::dot_block<W, T>(product, block, std::min(last, block + gemm::kTokensInL2), y + block,
                          y_stride);
}

// to[in, columns] = weight[columns, in]^T, multiples of W.
template <int W, typename T>
NABLA_FAST_INLINE void transpose_block(const T* weight, int64_t stride, int64_t in, int64_t columns,
                                       float* to) {
  for (int64_t column = 0; column < columns; column += W) {
    for (int64_t k = 0; k < in; k += W) {
      Floats<W> square[W];
#pragma GCC unroll 16
      for (int n = 0; n < W; ++n) square[n] = load_fp32<W>(weight + (column + n) * stride + k);
      transpose<W>(square);
#pragma GCC unroll 16
      for (int n = 0; n < W; ++n) store<W>(to + (k + n) * columns + column, square[n]);
    }
  }
}

// The same columns, at most kBlockColumns.
template <int W, typename T>
NABLA_FAST_INLINE void long_part_kernel(const float* x, int64_t x_stride, int64_t tokens,
                                        const void* weight, int64_t in, float* y, int64_t y_stride,
                                        int64_t first, int64_t last) {
  float block[kWeightBlock * kBlockColumns];
  const int64_t columns = last - first;
  for (int64_t t = 0; t < tokens; ++t)
    std::fill(y + t * y_stride + first, y + t * y_stride + last, 0.0f);
  for (int64_t k = 0; k < in; k += kWeightBlock) {
    const int64_t some = std::min(kWeightBlock, in - k);
    transpose_block<W>(static_cast<const T*>(weight) + first * in + k, in, some, columns, block);
    gemm::add_weighted_rows<W, float>(x + k, x_stride, tokens, some, block, columns, columns,
                                      y + first, y_stride);
  }
}

NABLA_FAST_FOR_EACH_ISA(fp32_short_part, short_part_kernel<W, float>)
NABLA_FAST_FOR_EACH_ISA(bf16_short_part, short_part_kernel<W, uint16_t>)
NABLA_FAST_FOR_EACH_ISA(fp16_short_part, short_part_kernel<W, Fp16>)
NABLA_FAST_FOR_EACH_ISA(fp32_long_part, long_part_kernel<W, float>)
NABLA_FAST_FOR_EACH_ISA(bf16_long_part, long_part_kernel<W, uint16_t>)
NABLA_FAST_FOR_EACH_ISA(fp16_long_part, long_part_kernel<W, Fp16>)

// -- backward -------------------------------------------------------------------------------------

// Columns [first, last) of dx[T, in] += dy[T, out] weight[out, in].
template <int W, typename T>
NABLA_FAST_INLINE void backward_part_kernel(const float* dy, int64_t dy_stride, int64_t tokens,
                                            const void* weight, LinearShape shape, float* dx,
                                            int64_t first, int64_t last) {
  const auto* const elements = static_cast<const T*>(weight);
  float block[kWeightBlock * kBlockColumns];
  for (int64_t row = 0; row < shape.out; row += kWeightBlock) {
    const int64_t some = std::min(kWeightBlock, shape.out - row);
    for (int64_t column = first; column < last; column += kBlockColumns) {
      const int64_t columns = std::min(kBlockColumns, last - column);
      const T* const from = elements + row * shape.in + column;
      if (tokens < kCopiedTokens) {
        gemm::add_weighted_rows<W, T>(dy + row, dy_stride, tokens, some, from, shape.in, columns,
                                      dx + column, shape.in);
        continue;
      }
      for (int64_t n = 0; n < some; ++n)
        copy_to_fp32<W, T>(from + n * shape.in, columns, block + n * columns);
      gemm::add_weighted_rows<W, float>(dy + row, dy_stride, tokens, some, block, columns, columns,
                                        dx + column, shape.in);
    }
  }
}

NABLA_FAST_FOR_EACH_ISA(fp32_backward_part, backward_part_kernel<W, float>)
NABLA_FAST_FOR_EACH_ISA(bf16_backward_part, backward_part_kernel<W, uint16_t>)
NABLA_FAST_FOR_EACH_ISA(fp16_backward_part, backward_part_kernel<W, Fp16>)

// -- by dtype -------------------------------------------------------------------------------------

template <typename Variants>
const Variants& of_type(WeightType type, const Variants& fp32, const Variants& bf16,
                        const Variants& fp16) {
  return type == WeightType::kFloat32 ? fp32 : type == WeightType::kBfloat16 ? bf16 : fp16;
}

}  // namespace

void linear(const float* x, int64_t x_stride, int64_t tokens, int64_t suffix, const Linear& layer,
            WeightType type, LinearShape shape, float* y, int64_t y_stride, int32_t num_threads) {
  auto* const run =
      (suffix >= kLongSuffix ? of_type(type, fp32_long_part, bf16_long_part, fp16_long_part)
                             : of_type(type, fp32_short_part, bf16_short_part, fp16_short_part))
          .select();
  const int threads = threads_of(tokens, shape, num_threads);
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1)
  for (int64_t first = 0; first < shape.out; first += kBlockColumns)
    run(x, x_stride, tokens, layer.weight, shape.in, y, y_stride, first,
        std::min(shape.out, first + kBlockColumns));
  if (!layer.bias) return;
  for (int64_t t = 0; t < tokens; ++t)
    for (int64_t k = 0; k < shape.out; ++k) y[t * y_stride + k] += layer.bias[k];
}

void linear_backward(const float* dy, int64_t dy_stride, int64_t tokens, const Linear& layer,
                     WeightType type, LinearShape shape, float* dx, int32_t num_threads) {
  auto* const run =
      of_type(type, fp32_backward_part, bf16_backward_part, fp16_backward_part).select();
  const int threads = threads_of(tokens, shape, num_threads);
  if (threads == 1) {
    run(dy, dy_stride, tokens, layer.weight, shape, dx, 0, shape.in);
    return;
  }
#pragma omp parallel for schedule(static) num_threads(threads)
  for (int64_t first = 0; first < shape.in; first += kBlockColumns)
    run(dy, dy_stride, tokens, layer.weight, shape, dx, first,
        std::min(shape.in, first + kBlockColumns));
}

}  // namespace nabla_fast::internal
