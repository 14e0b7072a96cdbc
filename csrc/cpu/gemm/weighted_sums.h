// add_weighted_sums() of vocab_tiles.h in vector registers, from a tile that products() has brought
// into the second-level cache: each element loaded serves as many rows as registers have room for.
// The same multiply-adds in the same order, whatever the number of rows.
#ifndef NABLA_FAST_CPU_GEMM_WEIGHTED_SUMS_H_
#define NABLA_FAST_CPU_GEMM_WEIGHTED_SUMS_H_

#include <cstdint>
#include <cstring>

#include "base/isa.h"
#include "base/prefetch.h"
#include "gemm/vocab_tiles.h"
#include "simd/bf16.h"
#include "simd/vec.h"

namespace nabla_fast::gemm {

// Vectors of columns of R rows at once: as many sums as registers hold beside the factors. Of AVX2's
// 16 twelve are sums of four rows: two multiply-adds a cycle wait for eight, and are held up by any
// delay of one.
template <int W, int R>
constexpr int kVectorsOfRow = W == 16            ? 16 / R
                              : W == 8 && R == 4 ? 3
                                                 : 8 / R;

template <int W>
constexpr int kRowsAtOnce = W == 16 ? 8 : 4;  // of many

// `C` vectors of columns of `R` rows.
template <int W, int R, int C, int kTokensPerPrefetch, typename T, typename P>
NABLA_FAST_INLINE void add_register_tile(const float* weights, int lanes, const T* columns,
                                         int64_t stride, int tokens, float* sums,
                                         int64_t sums_stride, P& prefetcher) {
  Floats<W> total[R * C] = {};
  for (int t = 0; t < tokens; ++t) {
    if (t % kTokensPerPrefetch == 0) prefetcher.template advance<C * W * sizeof(T)>();
    Floats<W> column[C];
#pragma GCC unroll 16
    for (int c = 0; c < C; ++c) column[c] = load_fp32<W>(columns + t * stride + c * W);
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
      const Floats<W> weight = broadcast<W>(weights[t * lanes + r]);
#pragma GCC unroll 16
      for (int c = 0; c < C; ++c) total[r * C + c] += weight * column[c];
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r) {
#pragma GCC unroll 16
    for (int c = 0; c < C; ++c) {
      float* const out = sums + r * sums_stride + c * W;
      store<W>(out, load<W>(out) + total[r * C + c]);
    }
  }
}

template <int W, int R, int kTokensPerPrefetch, typename T, typename P>
NABLA_FAST_INLINE void add_row_block(const float* weights, int lanes, const Table& table,
                                     int tokens, float* sums, int64_t sums_stride, P& prefetcher) {
  constexpr int C = kVectorsOfRow<W, R>;
  const auto* const data = static_cast<const T*>(table.data);
  int64_t k = 0;
  for (; k + C * W <= table.width; k += C * W)
    add_register_tile<W, R, C, kTokensPerPrefetch>(weights, lanes, data + k, table.stride, tokens,
                                                   sums + k, sums_stride, prefetcher);
  for (; k + W <= table.width; k += W)
    add_register_tile<W, R, 1, kTokensPerPrefetch>(weights, lanes, data + k, table.stride, tokens,
                                                   sums + k, sums_stride, prefetcher);
  if (k == table.width) return;
  // The last columns, with zeros behind them.
  T last[kVocabTileTokens * W] = {};
  for (int t = 0; t < tokens; ++t)
    std::memcpy(last + t * W, data + t * table.stride + k,
                sizeof(T) * static_cast<size_t>(table.width - k));
  add_register_tile<W, R, 1, kTokensPerPrefetch>(weights, lanes, last, W, tokens, sums + k,
                                                 sums_stride, prefetcher);
}

// The first rows, R at a time, and then the rest, R / 2 at a time; prefetches for every
// kTokensPerPrefetch-th token what it reads.
template <int W, int R, int kTokensPerPrefetch, typename T, typename P>
NABLA_FAST_INLINE void add_all_rows(const float* weights, int lanes, int rows, const Table& table,
                                    int tokens, float* sums, int64_t sums_stride, P& prefetcher) {
  int r = 0;
  for (; r + R <= rows; r += R)
    add_row_block<W, R, kTokensPerPrefetch, T>(weights + r, lanes, table, tokens,
                                               sums + r * sums_stride, sums_stride, prefetcher);
  if constexpr (R > 1)
    add_all_rows<W, R / 2, kTokensPerPrefetch, T>(weights + r, lanes, rows - r, table, tokens,
                                                  sums + r * sums_stride, sums_stride, prefetcher);
}

}  // namespace nabla_fast::gemm

#endif  // NABLA_FAST_CPU_GEMM_WEIGHTED_SUMS_H_
