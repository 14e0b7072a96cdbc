// Products by the vendor's library where it is there. Else, and for factors of two dtypes, by float32
// multiply-adds on tiles in shared memory: for every dtype and shape, without the device's matrix units.
// The order of a sum depends on its length alone then.

#include "call.h"
#include "cublas_lt.h"
#include "device.h"
#include "joins.h"
#include "launch.h"
#include "products.h"

namespace nabla_fast::cuda {
namespace {

constexpr int kTile = 64;   // rows and columns of a block's tile
constexpr int kDepth = 32;  // terms of each sum that lie in shared memory at a time
constexpr int kSide = 16;   // a block's threads form a square
constexpr int kEach = kTile / kSide;
static_assert(kSide * kSide == kThreads);

struct Tiles {
  float left[kDepth][kTile + 1], right[kDepth][kTile + 1];
};

// Fills tile[k][n] with element (n, k) of a matrix whose element (0, 0) is at `from`; 0 where it has
// none. Threads next to each other read along the rows that `across` says: of n, or of k.
template <typename T>
NABLA_FAST_DEVICE void load_tile(const T* from, int64_t n_stride, int64_t k_stride, int64_t n_count,
                                 int64_t k_count, bool across_k, float (&tile)[kDepth][kTile + 1]) {
  const int thread = static_cast<int>(threadIdx.x);
  for (int place = thread; place < kTile * kDepth; place += kThreads) {
    const int n = across_k ? place / kDepth : place % kTile;
    const int k = across_k ? place % kDepth : place / kTile;
    tile[k][n] = n < n_count && k < k_count ? to_float(from[n * n_stride + k * k_stride]) : 0.0f;
  }
}

template <typename L, typename R, bool kTransposed>
__global__ void __launch_bounds__(kThreads)
    product_kernel(Rows<const L> left, Rows<const R> right, Rows<float> out, int64_t rows,
                   int64_t columns, int64_t inner, bool keep) {
  NABLA_FAST_SHARED(Tiles, tiles);
  const int64_t column_tiles = (columns + kTile - 1) / kTile;
  const int64_t row0 = blockIdx.x / column_tiles * kTile;
  const int64_t column0 = blockIdx.x % column_tiles * kTile;
  // A thread's elements lie kSide apart, so that neighbours read neighbouring banks.
  const int down = static_cast<int>(threadIdx.x) / kSide;
  const int along = static_cast<int>(threadIdx.x) % kSide;
  const bool has_work = row0 + down < rows && column0 + along < columns;
  float total[kEach][kEach] = {};
  for (int64_t k = 0; k < inner; k += kDepth) {
    sync_block();
    load_tile(left.row(row0) + k, left.stride, 1, rows - row0, inner - k, true, tiles.left);
    if (kTransposed)
      load_tile(right.row(column0) + k, right.stride, 1, columns - column0, inner - k, true,
                tiles.right);
    else
      load_tile(right.row(k) + column0, 1, right.stride, columns - column0, inner - k, false,
                tiles.right);
    sync_block();
    if (!has_work) continue;
    // Sums of sums lose less than one long sum.
    float part[kEach][kEach] = {};
    for (int d = 0; d < kDepth; ++d) {
      float a[kEach], b[kEach];
      NABLA_FAST_UNROLL
      for (int n = 0; n < kEach; ++n) a[n] = tiles.left[d][down + kSide * n];
      NABLA_FAST_UNROLL
      for (int n = 0; n < kEach; ++n) b[n] = tiles.right[d][along + kSide * n];
      NABLA_FAST_UNROLL
      for (int i = 0; i < kEach; ++i) NABLA_FAST_UNROLL
      for (int j = 0; j < kEach; ++j) part[i][j] = fmaf(a[i], b[j], part[i][j]);
    }
    NABLA_FAST_UNROLL
    for (int i = 0; i < kEach; ++i) NABLA_FAST_UNROLL
    for (int j = 0; j < kEach; ++j) total[i][j] += part[i][j];
  }
  NABLA_FAST_UNROLL
  for (int i = 0; i < kEach; ++i) NABLA_FAST_UNROLL
  for (int j = 0; j < kEach; ++j) {
    const int64_t row = row0 + down + kSide * i, column = column0 + along + kSide * j;
    if (row >= rows || column >= columns) continue;
    float& result = out.row(row)[column];
    result = keep ? result + total[i][j] : total[i][j];
  }
}

template <bool kTransposed, typename L, typename R>
bool launch_product(const Product& product, L, R, nabla_fast_cuda_stream stream) {
  const int64_t tiles =
      (product.rows + kTile - 1) / kTile * ((product.columns + kTile - 1) / kTile);
  return launch({"product_kernel", stream, tiles, kThreads}, product_kernel<L, R, kTransposed>,
                {static_cast<const L*>(product.left.data), product.left.stride},
                {static_cast<const R*>(product.right.data), product.right.stride},
                {product.out, product.out_stride}, product.rows, product.columns, product.inner,
                product.keep);
}

}  // namespace

int64_t product_workspace_bytes() { return cublas_lt_is_there() ? int64_t{32} << 20 : 0; }

bool add_product(const Product& product, nabla_fast_cuda_stream stream) {
  if (product.left.dtype == product.right.dtype && cublas_lt_product(product, stream)) return true;
  return with_element(product.left.dtype, [&](auto left) {
    return with_element(product.right.dtype, [&](auto right) {
      return with_flag(product.transposed, [&](auto transposed) {
        return launch_product<decltype(transposed)::value>(product, left, right, stream);
      });
    });
  });
}

}  // namespace nabla_fast::cuda
