// Inner products of several rows with several tokens at once, the lanes of a vector along the
// width: for lm_logits, nll_grad and the decoder.
//
// An element is summed in 16 lanes over the width, and the lanes in a tree: in one order at every
// instruction set. products() of vocab_tiles.h has rows or tokens in its lanes and chains of 32
// columns, which is faster for many rows, and has other bits.
#ifndef NABLA_FAST_CPU_GEMM_DOT_PRODUCTS_H_
#define NABLA_FAST_CPU_GEMM_DOT_PRODUCTS_H_

#include <algorithm>
#include <cstdint>
#include <cstring>

#include "base/isa.h"
#include "simd/lanes.h"

namespace nabla_fast::gemm {

// Tokens and rows whose inner products are held in registers at once.
constexpr int kTokensInRegisters = 4;
constexpr int kRowsInRegisters = 4;
// Tokens of a block, which stay in the second-level cache while rows pass over it, and rows that
// stay in the first meanwhile.
constexpr int64_t kTokensInL2 = 64;
constexpr int64_t kRowsInL1 = 16;
// Bytes from the weights at work to those being prefetched: the hardware's own prefetcher leaves
// memory idle during the arithmetic.
constexpr int64_t kPrefetchBytes = 8192;

// Rows of hidden states [rows, width] and tokens of a head [vocab, width]; T is float or, for bf16,
// uint16_t.
struct HeadProduct {
  const float* hidden;
  int64_t rows, hidden_stride;
  const void* head;
  int64_t vocab, width, head_stride;
};

// logits[r * stride + t] of `R` rows from `row` on and four tokens from `token` on, of which the
// first `tokens` are stored. Summed in 16 lanes over the width, and the lanes in a tree: in one
// order.
template <int R, bool kPrefetch, typename T>
NABLA_FAST_INLINE void dot_tile(const HeadProduct& p, int64_t row, int64_t token, int tokens,
                                float* logits, int64_t stride) {
  const T* w[kTokensInRegisters];
#pragma GCC unroll 4
  for (int t = 0; t < kTokensInRegisters; ++t)
    w[t] = static_cast<const T*>(p.head) + (token + std::min(t, tokens - 1)) * p.head_stride;
  const float* h[R];
#pragma GCC unroll 4
  for (int r = 0; r < R; ++r) h[r] = p.hidden + (row + r) * p.hidden_stride;
  Lanes total[kRowsInRegisters * kTokensInRegisters] = {};
  // An address, not an access: behind the head's end it does nothing.
  int64_t tile_bytes = kTokensInRegisters * static_cast<int64_t>(sizeof(T)) * p.width;
  int64_t ahead = (kPrefetchBytes / (tile_bytes + 1) + 1) * kTokensInRegisters * p.head_stride;
  int64_t whole = p.width - p.width % kLanes;
  for (int64_t k = 0; k < whole; k += kLanes) {
    Lanes weights[kTokensInRegisters];
#pragma GCC unroll 4
    for (int t = 0; t < kTokensInRegisters; ++t) {
      weights[t] = load(w[t] + k);
      if (kPrefetch) __builtin_prefetch(w[t] + k + ahead);
    }
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) {
      Lanes state = load(h[r] + k);
#pragma GCC unroll 4
      for (int t = 0; t < kTokensInRegisters; ++t)
        total[r * kTokensInRegisters + t] += state * weights[t];
    }
  }
  if (int rest = static_cast<int>(p.width - whole)) {
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) {
      Lanes state = load_part(h[r] + whole, rest);
#pragma GCC unroll 4
      for (int t = 0; t < kTokensInRegisters; ++t)
        total[r * kTokensInRegisters + t] += state * load_part(w[t] + whole, rest);
    }
  }
  float result[kLanes];
  store(result, lane_sums(total));
#pragma GCC unroll 4
  for (int r = 0; r < R; ++r)
    std::memcpy(logits + r * stride, result + r * kTokensInRegisters,
                sizeof(float) * static_cast<size_t>(tokens));
}

// logits[(r - first) * stride + t] of rows [first, last) and up to four tokens.
template <bool kPrefetch, typename T>
NABLA_FAST_INLINE void dot_column(const HeadProduct& p, int64_t first, int64_t last, int64_t token,
                                  int tokens, float* logits, int64_t stride) {
  int64_t row = first;
  if (kPrefetch && last - first >= kRowsInRegisters) {
    dot_tile<kRowsInRegisters, true, T>(p, row, token, tokens, logits, stride);
    row += kRowsInRegisters;
  }
  for (; row + kRowsInRegisters <= last; row += kRowsInRegisters)
    dot_tile<kRowsInRegisters, false, T>(p, row, token, tokens, logits + (row - first) * stride,
                                         stride);
  float* rest = logits + (row - first) * stride;
  if (last - row == 3) dot_tile<3, kPrefetch, T>(p, row, token, tokens, rest, stride);
  if (last - row == 2) dot_tile<2, kPrefetch, T>(p, row, token, tokens, rest, stride);
  if (last - row == 1) dot_tile<1, kPrefetch, T>(p, row, token, tokens, rest, stride);
}

// out[r * stride + t - first] of all rows and tokens [first, last), at most kTokensInL2. The first
// rows read the tokens from memory, and the others from the second-level cache.
template <typename T>
NABLA_FAST_INLINE void dot_block(const HeadProduct& p, int64_t first, int64_t last, float* out,
                                 int64_t stride) {
  for (int64_t row = 0; row < p.rows; row += kRowsInL1) {
    const int64_t end = std::min(p.rows, row + kRowsInL1);
    for (int64_t token = first; token < last; token += kTokensInRegisters) {
      const int tokens = static_cast<int>(std::min<int64_t>(kTokensInRegisters, last - token));
      float* to = out + row * stride + token - first;
      if (row == 0)
        dot_column<true, T>(p, row, end, token, tokens, to, stride);
      else
        dot_column<false, T>(p, row, end, token, tokens, to, stride);
    }
  }
}

}  // namespace nabla_fast::gemm

#endif  // NABLA_FAST_CPU_GEMM_DOT_PRODUCTS_H_
