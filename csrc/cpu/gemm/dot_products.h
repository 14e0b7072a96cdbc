// Sixteen floats as one value, and inner products of several rows with several tokens at once.
#ifndef NABLA_FAST_CPU_GEMM_DOT_PRODUCTS_H_
#define NABLA_FAST_CPU_GEMM_DOT_PRODUCTS_H_

#include <algorithm>
#include <cstdint>
#include <cstring>

#include "base/isa.h"
#include "simd/vec.h"

namespace nabla_fast::cpu {

constexpr int kLanes = 16;

using Lanes = Floats<kLanes>;

NABLA_FAST_INLINE Lanes load(const float* x) { return load<kLanes>(x); }

NABLA_FAST_INLINE Lanes load(const uint16_t* x) {
  typedef uint32_t Words __attribute__((vector_size(4 * kLanes)));
  typedef uint16_t Halves __attribute__((vector_size(2 * kLanes)));
  Halves halves;
  std::memcpy(&halves, x, sizeof halves);
  Words words = __builtin_convertvector(halves, Words) << 16;
  Lanes lanes;
  std::memcpy(&lanes, &words, sizeof lanes);
  return lanes;
}

// The first `count` elements, and zeros.
template <typename T>
NABLA_FAST_INLINE Lanes load_part(const T* x, int count) {
  T padded[kLanes] = {};
  std::memcpy(padded, x, sizeof(T) * static_cast<size_t>(count));
  return load(padded);
}

NABLA_FAST_INLINE void store(float* x, Lanes lanes) { store<kLanes>(x, lanes); }

// The sums of 16 vectors' lanes, in order.
NABLA_FAST_INLINE Lanes sums(const Lanes (&x)[16]) {
  constexpr auto kIndices = std::make_integer_sequence<int, kLanes>{};
  Lanes a[8], b[4];
#pragma GCC unroll 8
  for (int n = 0; n < 8; ++n) a[n] = folded<kLanes, 8>(x[2 * n], x[2 * n + 1], kIndices);
#pragma GCC unroll 4
  for (int n = 0; n < 4; ++n) b[n] = folded<kLanes, 4>(a[2 * n], a[2 * n + 1], kIndices);
  return folded<kLanes, 1>(folded<kLanes, 2>(b[0], b[1], kIndices),
                           folded<kLanes, 2>(b[2], b[3], kIndices), kIndices);
}

// Tokens and rows whose inner products are held in registers at once.
constexpr int kTileTokens = 4;
constexpr int kTileRows = 4;
// How far ahead weights are fetched, in whole tiles: the hardware's own prefetching leaves memory
// idle during the arithmetic.
constexpr int64_t kBytesAhead = 8192;

// Rows of hidden states [rows, width] and tokens of a head [vocab, width]; T is float or, for bf16,
// uint16_t.
struct Product {
  const float* hidden;
  int64_t rows, hidden_stride;
  const void* head;
  int64_t vocab, width, head_stride;
};

// logits[r * stride + t] of `R` rows from `row` on and four tokens from `token` on, of which the
// first `tokens` are stored. Summed in 16 lanes over the width, and the lanes in a tree: in one
// order.
template <int R, bool kPrefetch, typename T>
NABLA_FAST_INLINE void product_tile(const Product& p, int64_t row, int64_t token, int tokens,
                                    float* logits, int64_t stride) {
  const T* w[kTileTokens];
#pragma GCC unroll 4
  for (int t = 0; t < kTileTokens; ++t)
    w[t] = static_cast<const T*>(p.head) + (token + std::min(t, tokens - 1)) * p.head_stride;
  const float* h[R];
#pragma GCC unroll 4
  for (int r = 0; r < R; ++r) h[r] = p.hidden + (row + r) * p.hidden_stride;
  Lanes total[kTileRows * kTileTokens] = {};
  // An address, not an access: behind the head's end it does nothing.
  int64_t tile_bytes = kTileTokens * static_cast<int64_t>(sizeof(T)) * p.width;
  int64_t ahead = (kBytesAhead / (tile_bytes + 1) + 1) * kTileTokens * p.head_stride;
  int64_t whole = p.width - p.width % kLanes;
  for (int64_t k = 0; k < whole; k += kLanes) {
    Lanes weights[kTileTokens];
#pragma GCC unroll 4
    for (int t = 0; t < kTileTokens; ++t) {
      weights[t] = load(w[t] + k);
      if (kPrefetch) __builtin_prefetch(w[t] + k + ahead);
    }
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) {
      Lanes state = load(h[r] + k);
#pragma GCC unroll 4
      for (int t = 0; t < kTileTokens; ++t) total[r * kTileTokens + t] += state * weights[t];
    }
  }
  if (int rest = static_cast<int>(p.width - whole)) {
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) {
      Lanes state = load_part(h[r] + whole, rest);
#pragma GCC unroll 4
      for (int t = 0; t < kTileTokens; ++t)
        total[r * kTileTokens + t] += state * load_part(w[t] + whole, rest);
    }
  }
  float result[kLanes];
  store(result, sums(total));
#pragma GCC unroll 4
  for (int r = 0; r < R; ++r)
    std::memcpy(logits + r * stride, result + r * kTileTokens,
                sizeof(float) * static_cast<size_t>(tokens));
}

// logits[(r - first) * stride + t] of rows [first, last) and up to four tokens.
template <bool kPrefetch, typename T>
NABLA_FAST_INLINE void product_column(const Product& p, int64_t first, int64_t last, int64_t token,
                                      int tokens, float* logits, int64_t stride) {
  int64_t row = first;
  if (kPrefetch && last - first >= kTileRows) {
    product_tile<kTileRows, true, T>(p, row, token, tokens, logits, stride);
    row += kTileRows;
  }
  for (; row + kTileRows <= last; row += kTileRows)
    product_tile<kTileRows, false, T>(p, row, token, tokens, logits + (row - first) * stride,
                                      stride);
  float* rest = logits + (row - first) * stride;
  if (last - row == 3) product_tile<3, kPrefetch, T>(p, row, token, tokens, rest, stride);
  if (last - row == 2) product_tile<2, kPrefetch, T>(p, row, token, tokens, rest, stride);
  if (last - row == 1) product_tile<1, kPrefetch, T>(p, row, token, tokens, rest, stride);
}

}  // namespace nabla_fast::cpu

#endif  // NABLA_FAST_CPU_GEMM_DOT_PRODUCTS_H_
