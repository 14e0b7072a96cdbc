// Products by the vendor's library where it is there. Else on tiles in shared memory, by the matrix units
// for factors of one half-precision dtype and by float32 multiply-adds for all others: for every shape, and
// slower. The order of a sum depends on its length alone then.

#include <type_traits>

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

// Tiles of half-precision elements, k along their rows. Two elements more keep neighbours' loads in
// different banks.
template <typename T>
struct HalfTiles {
  T left[kTile][kDepth + 2], right[kTile][kDepth + 2];
};

// Fills tile[n][k] with element (n, k), as load_tile() does.
template <typename T>
NABLA_FAST_DEVICE void load_half_tile(const T* from, int64_t n_stride, int64_t k_stride,
                                      int64_t n_count, int64_t k_count, bool across_k,
                                      T (&tile)[kTile][kDepth + 2]) {
  const int thread = static_cast<int>(threadIdx.x);
  for (int place = thread; place < kTile * kDepth; place += kThreads) {
    const int n = across_k ? place / kDepth : place % kTile;
    const int k = across_k ? place % kDepth : place / kTile;
    tile[n][k] = n < n_count && k < k_count ? from[n * n_stride + k * k_stride] : T{0};
  }
}

// A warp has 16 rows and 32 columns of a block's tile. A matrix unit cuts sums off rather than rounding
// them: it takes kDepth products, which are added to the others outside.
template <typename T, bool kTransposed>
__global__ void __launch_bounds__(kThreads)
    half_product_kernel(Rows<const T> left, Rows<const T> right, Rows<float> out, int64_t rows,
                        int64_t columns, int64_t inner, bool keep) {
  constexpr int kUnit = 16, kUnitColumns = 8, kUnits = 4, kWarpsDown = kTile / kUnit;
  NABLA_FAST_SHARED(HalfTiles<T>, tiles);
  const int64_t column_tiles = (columns + kTile - 1) / kTile;
  const int64_t row0 = blockIdx.x / column_tiles * kTile;
  const int64_t column0 = blockIdx.x % column_tiles * kTile;
  const int group = lane() / 4, place = lane() % 4;
  const int down = warp() % kWarpsDown * kUnit + group;
  const int along = warp() / kWarpsDown * kUnits * kUnitColumns;
  float total[kUnits][4] = {};
  for (int64_t k = 0; k < inner; k += kDepth) {
    sync_block();
    load_half_tile(left.row(row0) + k, left.stride, 1, rows - row0, inner - k, true, tiles.left);
    if (kTransposed)
      load_half_tile(right.row(column0) + k, right.stride, 1, columns - column0, inner - k, true,
                     tiles.right);
    else
      load_half_tile(right.row(k) + column0, 1, right.stride, columns - column0, inner - k, false,
                     tiles.right);
    sync_block();
    float part[kUnits][4] = {};
    NABLA_FAST_UNROLL
    for (int d = 0; d < kDepth; d += kUnit) {
      const int first = d + 2 * place;
      const uint32_t a[4] = {
          load_pair(&tiles.left[down][first]), load_pair(&tiles.left[down + 8][first]),
          load_pair(&tiles.left[down][first + 8]), load_pair(&tiles.left[down + 8][first + 8])};
      NABLA_FAST_UNROLL
      for (int unit = 0; unit < kUnits; ++unit) {
        const T* const column = tiles.right[along + unit * kUnitColumns + group];
        const uint32_t b[2] = {load_pair(column + first), load_pair(column + first + 8)};
        mma_16x8x16<T>(part[unit], a, b);
      }
    }
    NABLA_FAST_UNROLL
    for (int unit = 0; unit < kUnits; ++unit) NABLA_FAST_UNROLL
    for (int n = 0; n < 4; ++n) total[unit][n] += part[unit][n];
  }
  NABLA_FAST_UNROLL
  for (int unit = 0; unit < kUnits; ++unit) NABLA_FAST_UNROLL
  for (int n = 0; n < 4; ++n) {
    const int64_t row = row0 + down + n / 2 * 8;
    const int64_t column = column0 + along + unit * kUnitColumns + 2 * place + n % 2;
    if (row >= rows || column >= columns) continue;
    float& result = out.row(row)[column];
    result = keep ? result + total[unit][n] : total[unit][n];
  }
}

template <bool kTransposed, typename L, typename R>
bool launch_product(const Product& product, L, R, nabla_fast_cuda_stream stream) {
  const int64_t tiles =
      (product.rows + kTile - 1) / kTile * ((product.columns + kTile - 1) / kTile);
  const Rows<const L> left = {static_cast<const L*>(product.left.data), product.left.stride};
  const Rows<const R> right = {static_cast<const R*>(product.right.data), product.right.stride};
  const Rows<float> out = {product.out, product.out_stride};
  if constexpr (std::is_same_v<L, R> && sizeof(L) == 2)
    return launch({"half_product_kernel", stream, tiles, kThreads},
                  half_product_kernel<L, kTransposed>, left, right, out, product.rows,
                  product.columns, product.inner, product.keep);
  else
    return launch({"product_kernel", stream, tiles, kThreads}, product_kernel<L, R, kTransposed>,
                  left, right, out, product.rows, product.columns, product.inner, product.keep);
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
