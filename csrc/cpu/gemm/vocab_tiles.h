// The two matrix products of an op over a vocabulary, by tiles that stay in a cache:
//
//   products           z[t, r] = sum_k table[t, k] rows[r, k]     logits, or one-hot gradients
//   add_weighted_sums  sums[r, k] += sum_t weights[t, r] table[t, k]
//
// for at most 64 rows and 64 tokens at a time. A table is read once, its next tile prefetched
// during the arithmetic on one: both products run at the rate of the arithmetic from some 16 rows
// on, and at that of memory below.
//
// An element is a sum of chains of multiply-adds, added in order: over every eighth of 256 columns, or
// 64 tokens. It has the same bits whatever rows are beside it, few or many. lm_logits, nll_grad and
// the decoder promise the bits of another order, that of dot_products.h and add_weighted_rows.h.
#ifndef NABLA_FAST_CPU_GEMM_VOCAB_TILES_H_
#define NABLA_FAST_CPU_GEMM_VOCAB_TILES_H_

#include <cstdint>

#include "base/check.h"
#include "base/isa.h"
#include "nabla_fast.h"
#include "simd/bf16.h"
#include "simd/lanes.h"

namespace nabla_fast::gemm {

// Most rows that share a pass over a table, and most tokens of a tile.
constexpr int kRowsPerGroup = 64;
constexpr int kVocabTileTokens = 64;
// Most tokens of a call of add_weighted_sums(). The matrix unit reads and writes all sums for as many
// tokens as it is given, and the fewer the longer.
constexpr int kMostSumTokens = 2 * kVocabTileTokens;

// Rows of a group lie side by side in a tile [tokens, lanes]; a vector never holds fewer.
constexpr int lanes_of(int rows) { return (rows + 15) / 16 * 16; }

// A table [.., width] of float32 or bf16, from one of its rows on.
struct Table {
  const void* data;
  nabla_fast_dtype dtype;
  int64_t width, stride;

  int bytes() const { return dtype == NABLA_FAST_FLOAT32 ? 4 : 2; }
  Table from(int64_t token) const {
    return {static_cast<const char*>(data) + token * stride * bytes(), dtype, width, stride};
  }
  float value(int64_t token, int64_t column) const {
    const int64_t at = token * stride + column;
    return dtype == NABLA_FAST_FLOAT32 ? static_cast<const float*>(data)[at]
                                       : bf16_to_fp32(static_cast<const uint16_t*>(data)[at]);
  }
};

// to[k] = columns [column, column + columns) of a row of a table, and zeros up to the next multiple
// of 16.
template <int W>
NABLA_FAST_INLINE void copy_to_fp32(const Table& table, int64_t token, int64_t column,
                                    int64_t columns, float* to) {
  const int64_t at = token * table.stride + column;
  if (table.dtype == NABLA_FAST_FLOAT32)
    nabla_fast::copy_to_fp32<W>(static_cast<const float*>(table.data) + at, columns, to);
  else
    nabla_fast::copy_to_fp32<W>(static_cast<const uint16_t*>(table.data) + at, columns, to);
}

// First `count` rows of a table, which fit (base/check.h).
inline Table table_of(const nabla_fast_matrix& t, int64_t count) {
  return {t.data, t.dtype, t.width, stride_of(t, count)};
}

// Rows as products() reads them: [width, lanes] of float, or [rows, width] of a few rows; where they
// and the table are bf16 and the CPU has a dot product for it, of pairs of bf16 in place of floats; in
// the order of products.cpp; and where the table is bf16 and there is a matrix unit, as amx.h says.
struct PackedRows {
  const void* data;
  int rows;
  int64_t width;
  bool pairs;
  int terms;  // bf16 terms whose sum a number is; 0 where there is no matrix unit

  int lanes() const { return lanes_of(rows); }
  // Columns, or pairs of them.
  int64_t columns() const { return pairs ? (width + 1) / 2 : width; }
  // Bytes for any of these forms.
  static int64_t bytes(int rows, int64_t width) {
    return 6 * lanes_of(rows) * ((width + 31) / 32 * 32) + 64;
  }
};

// Packs the first `rows` rows of `from`, at most kRowsPerGroup, for products with a table of
// `table_dtype`. `memory`: PackedRows::bytes(), aligned to 64.
PackedRows pack_rows(const Table& from, int rows, nabla_fast_dtype table_dtype, void* memory);

// z[t * lanes + r] = <table[t], rows[r]>, or += it, for at most kVocabTileTokens tokens; lanes
// behind the last row become 0, or stay.
void products(const PackedRows& rows, const Table& table, int tokens, bool add, float* z);

// products() with table[token_rows[t]] in place of table[t], in the same bits.
void mapped_products(const PackedRows& rows, const Table& table, const int64_t* token_rows,
                     int tokens, bool add, float* z);

// Whether weights that are bf16 numbers make weighted sums of a table faster at a level: their
// products with bf16 elements are what its instructions multiply.
constexpr bool rounds_weights(const Table& table, nabla_fast_isa isa) {
  return table.dtype == NABLA_FAST_BFLOAT16 && isa >= NABLA_FAST_ISA_AVX512_BF16;
}

// sums[r * padded(width) + k] += sum_t weights[t * lanes + r] table[t, k] for at most kRowsPerGroup
// rows and kMostSumTokens tokens. Columns behind the width of a row become 0 or stay.
// bf16_weights: all weights are bf16 numbers.
void add_weighted_sums(const float* weights, int lanes, int rows, const Table& table, int tokens,
                       float* sums, bool bf16_weights = false);

}  // namespace nabla_fast::gemm

#endif  // NABLA_FAST_CPU_GEMM_VOCAB_TILES_H_
