// Weighted sums of a table's rows, the tokens of an element in order from the first to the last:
// the other product of a linear layer, for nll_grad and the decoder. What a call adds is summed
// before it is added: beside a large sum, small terms would be lost one by one.
// add_weighted_sums() of vocab_tiles.h adds in another order, and has other bits.
#ifndef NABLA_FAST_CPU_GEMM_ADD_WEIGHTED_ROWS_H_
#define NABLA_FAST_CPU_GEMM_ADD_WEIGHTED_ROWS_H_

#include <algorithm>
#include <cstdint>
#include <cstring>

#include "base/isa.h"
#include "gemm/dot_products.h"

namespace nabla_fast::gemm {

// Lanes of columns that are added up in registers at once, and rows of them: AVX-512 has 32
// registers, AVX2 16 of half as many numbers.
template <int W>
constexpr int kColumnVectorsInRegisters = W == kLanes ? 4 : 1;
template <int W>
constexpr int kSumRowsInRegisters = W < 8 ? 2 : 4;

// sums[r, ..] += sum_t weights[r, t] table[t, ..] for `R` rows and `C` Lanes of columns; one alone
// has `rest` columns if that is not 0.
template <int W, int R, int C, typename T>
NABLA_FAST_INLINE void add_columns(const float* weights, int64_t weights_stride, int64_t tokens,
                                   const T* table, int64_t table_stride, float* sums,
                                   int64_t sums_stride, int rest) {
  constexpr int kVectors = C * kLanes / W;
  Floats<W> total[R * kVectors] = {};
  for (int64_t t = 0; t < tokens; ++t) {
    const T* columns = table + t * table_stride;
    T part[kLanes] = {};
    if (C == 1 && rest) {
      std::memcpy(part, columns, sizeof(T) * static_cast<size_t>(rest));
      columns = part;
    }
    Floats<W> row[kVectors];
#pragma GCC unroll 4
    for (int c = 0; c < kVectors; ++c) row[c] = in_register<W>(load_fp32<W>(columns + c * W));
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) {
      const Floats<W> weight = broadcast<W>(weights[r * weights_stride + t]);
#pragma GCC unroll 4
      for (int c = 0; c < kVectors; ++c) total[r * kVectors + c] += weight * row[c];
    }
  }
#pragma GCC unroll 4
  for (int r = 0; r < R; ++r) {
#pragma GCC unroll 4
    for (int c = 0; c < kVectors; ++c) {
      float* const sum = sums + r * sums_stride + c * W;
      store<W>(sum, load<W>(sum) + total[r * kVectors + c]);
    }
  }
}

template <int W, int C, typename T>
NABLA_FAST_INLINE void add_rows(const float* weights, int64_t weights_stride, int64_t rows,
                                int64_t tokens, const T* table, int64_t table_stride, float* sums,
                                int64_t sums_stride, int rest) {
  int64_t row = 0;
  for (; row + kSumRowsInRegisters<W> <= rows; row += kSumRowsInRegisters<W>)
    add_columns<W, kSumRowsInRegisters<W>, C, T>(weights + row * weights_stride, weights_stride,
                                                 tokens, table, table_stride,
                                                 sums + row * sums_stride, sums_stride, rest);
  for (; row < rows; ++row)
    add_columns<W, 1, C, T>(weights + row * weights_stride, weights_stride, tokens, table,
                            table_stride, sums + row * sums_stride, sums_stride, rest);
}

// sums[r, k] += sum_t weights[r, t] table[t, k] for [rows, tokens] weights and a table [tokens,
// width], float or bf16; the tokens of an element in order. `sums` has room for padded(width)
// columns.
template <int W, typename T>
NABLA_FAST_INLINE void add_weighted_rows(const float* weights, int64_t weights_stride, int64_t rows,
                                         int64_t tokens, const T* table, int64_t table_stride,
                                         int64_t width, float* sums, int64_t sums_stride) {
  int64_t column = 0;
  for (; column + kColumnVectorsInRegisters<W> * kLanes <= width;
       column += kColumnVectorsInRegisters<W> * kLanes)
    add_rows<W, kColumnVectorsInRegisters<W>, T>(weights, weights_stride, rows, tokens,
                                                 table + column, table_stride, sums + column,
                                                 sums_stride, 0);
  for (; column < width; column += kLanes) {
    int rest = static_cast<int>(std::min<int64_t>(kLanes, width - column)) % kLanes;
    add_rows<W, 1, T>(weights, weights_stride, rows, tokens, table + column, table_stride,
                      sums + column, sums_stride, rest);
  }
}

}  // namespace nabla_fast::gemm

#endif  // NABLA_FAST_CPU_GEMM_ADD_WEIGHTED_ROWS_H_
