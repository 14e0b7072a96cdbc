// mix(): a strip of 64 columns of the tile is laid into the first-level cache, as float32, and then
// four rows at a time pass over it. Meanwhile the next tile comes into the second level from memory.

#include <algorithm>
#include <cstdint>

#include "ahead.h"
#include "isa.h"
#include "tiles.h"
#include "vec.h"
#include "widen.h"

namespace nabla_fast::cpu {
namespace {

constexpr int kStrip = 64;
// Rows and vectors of columns whose sums are held in registers at once.
constexpr int kRows = 4;
template <int W>
constexpr int kColumns = W == 16 ? 4 : 2;
// Tokens between two fetches.
constexpr int kStep = 4;

template <int W, int C, int R>
NABLA_FAST_INLINE void add_token(const float* weights, const float* columns,
                                 Floats<W> (&total)[R * C]) {
  Floats<W> column[C];
#pragma GCC unroll 4
  for (int c = 0; c < C; ++c) column[c] = load<W>(columns + c * W);
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r) {
    const Floats<W> weight = spread<W>(weights[r]);
#pragma GCC unroll 4
    for (int c = 0; c < C; ++c) total[r * C + c] += weight * column[c];
  }
}

// `R` rows of `C` vectors of columns; weights: of the first of them.
template <int W, int C, int R>
NABLA_FAST_INLINE void add_rows(const float* weights, int lanes, const float* strip, int tokens,
                                float* mix, int64_t stride, Ahead& ahead) {
  // The sums lie in the second-level cache; they are here when the tokens have been added up.
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r) {
    for (int k = 0; k < C * W; k += 16) __builtin_prefetch(mix + r * stride + k, 1, 3);
  }
  Floats<W> total[R * C] = {};
  int t = 0;
  for (; t + kStep <= tokens; t += kStep) {
    ahead.line();
#pragma GCC unroll 4
    for (int u = 0; u < kStep; ++u)
      add_token<W, C, R>(weights + (t + u) * lanes, strip + (t + u) * kStrip, total);
  }
  for (; t < tokens; ++t) add_token<W, C, R>(weights + t * lanes, strip + t * kStrip, total);
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r) {
#pragma GCC unroll 4
    for (int c = 0; c < C; ++c) {
      float* out = mix + r * stride + c * W;
      store<W>(out, load<W>(out) + total[r * C + c]);
    }
  }
}

// All rows of `C` vectors of columns.
template <int W, int C>
NABLA_FAST_INLINE void add_strip(const float* weights, int lanes, int rows, const float* strip,
                                 int tokens, float* mix, int64_t stride, Ahead& ahead) {
  int r = 0;
  for (; r + kRows <= rows; r += kRows)
    add_rows<W, C, kRows>(weights + r, lanes, strip, tokens, mix + r * stride, stride, ahead);
  for (; r < rows; ++r)
    add_rows<W, C, 1>(weights + r, lanes, strip, tokens, mix + r * stride, stride, ahead);
}

template <int W>
NABLA_FAST_INLINE void mix_tile(const float* weights, int lanes, int rows, const Table& table,
                                int tokens, float* mix) {
  alignas(64) float strip[kTileTokens * kStrip];
  const int64_t stride = padded(table.width);
  Ahead ahead{static_cast<const char*>(table.from(tokens).data)};
  for (int64_t column = 0; column < table.width; column += kStrip) {
    const int64_t columns = std::min<int64_t>(kStrip, table.width - column);
    for (int t = 0; t < tokens; ++t) widen<W>(table, t, column, columns, strip + t * kStrip);
    const int vectors = static_cast<int>(padded(columns) / W);
    int v = 0;
    for (; v + kColumns<W> <= vectors; v += kColumns<W>)
      add_strip<W, kColumns<W>>(weights, lanes, rows, strip + v * W, tokens, mix + column + v * W,
                                stride, ahead);
    for (; v < vectors; ++v)
      add_strip<W, 1>(weights, lanes, rows, strip + v * W, tokens, mix + column + v * W, stride,
                      ahead);
  }
}

using Mix = void(const float*, int, int, const Table&, int, float*);

void mix_baseline(const float* w, int lanes, int rows, const Table& t, int n, float* m) {
  mix_tile<4>(w, lanes, rows, t, n, m);
}
NABLA_FAST_TARGET_AVX2 void mix_avx2(const float* w, int lanes, int rows, const Table& t, int n,
                                     float* m) {
  mix_tile<8>(w, lanes, rows, t, n, m);
}
NABLA_FAST_TARGET_AVX512 void mix_avx512(const float* w, int lanes, int rows, const Table& t, int n,
                                         float* m) {
  mix_tile<16>(w, lanes, rows, t, n, m);
}

}  // namespace

void mix(const float* weights, int lanes, int rows, const Table& table, int tokens, float* mix) {
  static_cast<Mix*>(select_isa(mix_baseline, mix_avx2, mix_avx512))(weights, lanes, rows, table,
                                                                    tokens, mix);
}

}  // namespace nabla_fast::cpu
