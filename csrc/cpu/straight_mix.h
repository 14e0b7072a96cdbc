// mix() of tiles.h straight from a tile that products() has brought into the second-level cache:
// nothing of it is laid out anew, and each of its elements serves as many rows as registers have
// room for. The same multiply-adds in the same order, whatever the number of rows.
#ifndef NABLA_FAST_CPU_STRAIGHT_MIX_H_
#define NABLA_FAST_CPU_STRAIGHT_MIX_H_

#include <cstdint>
#include <cstring>

#include "ahead.h"
#include "isa.h"
#include "tiles.h"
#include "vec.h"
#include "widen.h"

namespace nabla_fast::cpu {

// `C` vectors of columns of `R` rows.
template <int W, int R, int C, typename T>
NABLA_FAST_INLINE void mix_columns(const float* weights, int lanes, const T* columns,
                                   int64_t stride, int tokens, float* mix, int64_t mix_stride,
                                   Ahead& ahead) {
  constexpr int kStep = 4;  // tokens between two fetches
  Floats<W> total[R * C] = {};
  for (int t = 0; t < tokens; ++t) {
    // A quarter of what the sums use up: products() fetches too, and has more time for it.
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

template <int W, int R, typename T>
NABLA_FAST_INLINE void mix_rows(const float* weights, int lanes, const Table& table, int tokens,
                                float* mix) {
  // As many sums as registers hold beside what they are made of.
  constexpr int C = (W == 16 ? 16 : 8) / R;
  const auto* const data = static_cast<const T*>(table.data);
  const int64_t stride = padded(table.width);
  // The tile behind the next one, which products() has fetched.
  Ahead ahead{static_cast<const char*>(table.from(2 * tokens).data)};
  int64_t k = 0;
  for (; k + C * W <= table.width; k += C * W)
    mix_columns<W, R, C>(weights, lanes, data + k, table.stride, tokens, mix + k, stride, ahead);
  for (; k + W <= table.width; k += W)
    mix_columns<W, R, 1>(weights, lanes, data + k, table.stride, tokens, mix + k, stride, ahead);
  if (k == table.width) return;
  // The last columns, with zeros behind them.
  T last[kTileTokens * W] = {};
  for (int t = 0; t < tokens; ++t)
    std::memcpy(last + t * W, data + t * table.stride + k,
                sizeof(T) * static_cast<size_t>(table.width - k));
  mix_columns<W, R, 1>(weights, lanes, last, W, tokens, mix + k, stride, ahead);
}

// The first rows, R at a time, and then the rest, R / 2 at a time.
template <int W, int R, typename T>
NABLA_FAST_INLINE void mix_all(const float* weights, int lanes, int rows, const Table& table,
                               int tokens, float* mix) {
  int r = 0;
  for (; r + R <= rows; r += R)
    mix_rows<W, R, T>(weights + r, lanes, table, tokens, mix + r * padded(table.width));
  if constexpr (R > 1)
    mix_all<W, R / 2, T>(weights + r, lanes, rows - r, table, tokens,
                         mix + r * padded(table.width));
}

// As mix().
template <int W>
NABLA_FAST_INLINE void straight_mix(const float* weights, int lanes, int rows, const Table& table,
                                    int tokens, float* mix) {
  constexpr int kRows = W == 16 ? 8 : 4;
  if (table.dtype == NABLA_FAST_FLOAT32)
    mix_all<W, kRows, float>(weights, lanes, rows, table, tokens, mix);
  else
    mix_all<W, kRows, uint16_t>(weights, lanes, rows, table, tokens, mix);
}

}  // namespace nabla_fast::cpu

#endif  // NABLA_FAST_CPU_STRAIGHT_MIX_H_
