// mix() of vocab_tiles.h straight from a tile that products() has brought into the second-level cache:
// nothing of it is laid out anew, and each of its elements serves as many rows as registers have
// room for. The same multiply-adds in the same order, whatever the number of rows.
#ifndef NABLA_FAST_CPU_GEMM_WEIGHTED_SUMS_H_
#define NABLA_FAST_CPU_GEMM_WEIGHTED_SUMS_H_

#include <algorithm>
#include <cstdint>
#include <cstring>

#include "base/isa.h"
#include "base/prefetch.h"
#include "gemm/vocab_tiles.h"
#include "gemm/widen.h"
#include "simd/vec.h"

namespace nabla_fast::gemm {

// `C` vectors of columns of `R` rows.
template <int W, int R, int C, int kStep, typename T>
NABLA_FAST_INLINE void mix_columns(const float* weights, int lanes, const T* columns,
                                   int64_t stride, int tokens, float* mix, int64_t mix_stride,
                                   Ahead& ahead) {
  Floats<W> total[R * C] = {};
  for (int t = 0; t < tokens; ++t) {
    if (t % kStep == 0) ahead.walk<C * W * sizeof(T)>();
    Floats<W> column[C];
#pragma GCC unroll 16
    for (int c = 0; c < C; ++c) column[c] = load_wide<W>(columns + t * stride + c * W);
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
      const Floats<W> weight = spread<W>(weights[t * lanes + r]);
#pragma GCC unroll 16
      for (int c = 0; c < C; ++c) total[r * C + c] += weight * column[c];
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r) {
#pragma GCC unroll 16
    for (int c = 0; c < C; ++c) {
      float* const out = mix + r * mix_stride + c * W;
      store<W>(out, load<W>(out) + total[r * C + c]);
    }
  }
}

template <int W, int R, int kStep, typename T>
NABLA_FAST_INLINE void mix_rows(const float* weights, int lanes, const Table& table, int tokens,
                                float* mix, int64_t mix_stride, Ahead& ahead) {
  // As many sums as registers hold beside what they are made of.
  constexpr int C = (W == 16 ? 16 : 8) / R;
  const auto* const data = static_cast<const T*>(table.data);
  int64_t k = 0;
  for (; k + C * W <= table.width; k += C * W)
    mix_columns<W, R, C, kStep>(weights, lanes, data + k, table.stride, tokens, mix + k, mix_stride,
                                ahead);
  for (; k + W <= table.width; k += W)
    mix_columns<W, R, 1, kStep>(weights, lanes, data + k, table.stride, tokens, mix + k, mix_stride,
                                ahead);
  if (k == table.width) return;
  // The last columns, with zeros behind them.
  T last[kVocabTileTokens * W] = {};
  for (int t = 0; t < tokens; ++t)
    std::memcpy(last + t * W, data + t * table.stride + k,
                sizeof(T) * static_cast<size_t>(table.width - k));
  mix_columns<W, R, 1, kStep>(weights, lanes, last, W, tokens, mix + k, mix_stride, ahead);
}

// The first rows, R at a time, and then the rest, R / 2 at a time.
template <int W, int R, int kStep, typename T>
NABLA_FAST_INLINE void mix_all(const float* weights, int lanes, int rows, const Table& table,
                               int tokens, float* mix, int64_t mix_stride, Ahead& ahead) {
  int r = 0;
  for (; r + R <= rows; r += R)
    mix_rows<W, R, kStep, T>(weights + r, lanes, table, tokens, mix + r * mix_stride, mix_stride,
                             ahead);
  if constexpr (R > 1)
    mix_all<W, R / 2, kStep, T>(weights + r, lanes, rows - r, table, tokens, mix + r * mix_stride,
                                mix_stride, ahead);
}

// As mix(), fetching from `ahead` on a kStep-th of what the sums of each 8 rows use up.
template <int W, int kStep>
NABLA_FAST_INLINE void straight_mix(const float* weights, int lanes, int rows, const Table& table,
                                    int tokens, float* mix, Ahead ahead) {
  constexpr int kRows = W == 16 ? 8 : 4;
  if (table.dtype == NABLA_FAST_FLOAT32)
    mix_all<W, kRows, kStep, float>(weights, lanes, rows, table, tokens, mix, padded(table.width),
                                    ahead);
  else
    mix_all<W, kRows, kStep, uint16_t>(weights, lanes, rows, table, tokens, mix,
                                       padded(table.width), ahead);
}

// The same of a bf16 table for many rows, for which it pays to widen its elements once: 64 columns at
// a time, which stay in the first-level cache.
template <int W>
NABLA_FAST_INLINE void widened_mix(const float* weights, int lanes, int rows, const Table& table,
                                   int tokens, float* mix, Ahead ahead) {
  constexpr int kStripColumns = 64, kRows = W == 16 ? 8 : 4;
  alignas(64) float strip[kVocabTileTokens * kStripColumns];
  for (int64_t k = 0; k < table.width; k += kStripColumns) {
    const int64_t columns = std::min<int64_t>(kStripColumns, table.width - k);
    for (int t = 0; t < tokens; ++t) widen<W>(table, t, k, columns, strip + t * kStripColumns);
    const Table wide{strip, NABLA_FAST_FLOAT32, columns, kStripColumns};
    mix_all<W, kRows, 8, float>(weights, lanes, rows, wide, tokens, mix + k, padded(table.width),
                                ahead);
  }
}

}  // namespace nabla_fast::gemm

#endif  // NABLA_FAST_CPU_GEMM_WEIGHTED_SUMS_H_
