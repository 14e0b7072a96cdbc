// Weighted sums of a table's rows, the tokens of an element in order from the first to the last:
// the other product of a linear layer, for nll_grad and the decoder. add_weighted_sums() of
// vocab_tiles.h sums the tokens of a tile before it adds them, and has other bits.
#ifndef NABLA_FAST_CPU_GEMM_ADD_WEIGHTED_ROWS_H_
#define NABLA_FAST_CPU_GEMM_ADD_WEIGHTED_ROWS_H_

#include <algorithm>
#include <cstdint>

#include "base/isa.h"
#include "gemm/dot_products.h"

namespace nabla_fast::gemm {

// Vectors of columns that are added up in registers at once.
constexpr int kColumnVectorsInRegisters = 4;

// sums[r, ..] += sum_t weights[r, t] table[t, ..] for `R` rows and `C` vectors of columns, of which
// the last has `rest` elements if that is not 0.
template <int R, int C, typename T>
NABLA_FAST_INLINE void add_columns(const float* weights, int64_t weights_stride, int64_t tokens,
                                   const T* table, int64_t table_stride, float* sums,
                                   int64_t sums_stride, int rest) {
  Lanes total[R * C];
#pragma GCC unroll 4
  for (int r = 0; r < R; ++r) {
#pragma GCC unroll 4
    for (int c = 0; c < C; ++c) total[r * C + c] = load(sums + r * sums_stride + c * kLanes);
  }
  for (int64_t t = 0; t < tokens; ++t) {
    const T* w = table + t * table_stride;
    Lanes row[C];
#pragma GCC unroll 4
    for (int c = 0; c < C; ++c)
      row[c] = rest && c == C - 1 ? load_part(w + c * kLanes, rest) : load(w + c * kLanes);
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) {
      float weight = weights[r * weights_stride + t];
#pragma GCC unroll 4
      for (int c = 0; c < C; ++c) total[r * C + c] += weight * row[c];
    }
  }
#pragma GCC unroll 4
  for (int r = 0; r < R; ++r) {
#pragma GCC unroll 4
    for (int c = 0; c < C; ++c) store(sums + r * sums_stride + c * kLanes, total[r * C + c]);
  }
}

template <int C, typename T>
NABLA_FAST_INLINE void add_rows(const float* weights, int64_t weights_stride, int64_t rows,
                                int64_t tokens, const T* table, int64_t table_stride, float* sums,
                                int64_t sums_stride, int rest) {
  int64_t row = 0;
  for (; row + kRowsInRegisters <= rows; row += kRowsInRegisters)
    add_columns<kRowsInRegisters, C, T>(weights + row * weights_stride, weights_stride, tokens,
                                        table, table_stride, sums + row * sums_stride, sums_stride,
                                        rest);
  for (; row < rows; ++row)
    add_columns<1, C, T>(weights + row * weights_stride, weights_stride, tokens, table,
                         table_stride, sums + row * sums_stride, sums_stride, rest);
}

// sums[r, k] += sum_t weights[r, t] table[t, k] for [rows, tokens] weights and a table [tokens,
// width], float or bf16; the tokens of an element in order. `sums` has room for padded(width)
// columns.
template <typename T>
NABLA_FAST_INLINE void add_weighted_rows(const float* weights, int64_t weights_stride, int64_t rows,
                                         int64_t tokens, const T* table, int64_t table_stride,
                                         int64_t width, float* sums, int64_t sums_stride) {
  int64_t column = 0;
  for (; column + kColumnVectorsInRegisters * kLanes <= width;
       column += kColumnVectorsInRegisters * kLanes)
    add_rows<kColumnVectorsInRegisters, T>(weights, weights_stride, rows, tokens, table + column,
                                           table_stride, sums + column, sums_stride, 0);
  for (; column < width; column += kLanes) {
    int rest = static_cast<int>(std::min<int64_t>(kLanes, width - column)) % kLanes;
    add_rows<1, T>(weights, weights_stride, rows, tokens, table + column, table_stride,
                   sums + column, sums_stride, rest);
  }
}

}  // namespace nabla_fast::gemm

#endif  // NABLA_FAST_CPU_GEMM_ADD_WEIGHTED_ROWS_H_
