// Inner products of several rows with several tokens at once, the lanes of a vector along the
// width: for lm_logits, nll_grad and the decoder.
//
// An element is summed in 16 lanes over the width, and the lanes in a tree: in one order at every
// instruction set. products() of vocab_tiles.h has many rows in its lanes, which is faster for them, and
// has other bits.
#ifndef NABLA_FAST_CPU_GEMM_DOT_PRODUCTS_H_
#define NABLA_FAST_CPU_GEMM_DOT_PRODUCTS_H_

#include <algorithm>
#include <cstdint>
#include <cstring>

#include "base/isa.h"
#include "simd/lanes.h"

namespace nabla_fast::gemm {

// Tokens and rows whose inner products are summed at once, in registers where there are 32.
constexpr int kTokensInRegisters = 4;
constexpr int kMostRowsInRegisters = 4;
// Tokens of a block, which stay in the second-level cache while rows pass over it, and rows that pass
// over each of its tiles before the next: fours, or also threes.
constexpr int64_t kTokensInL2 = 64;
template <int W>
constexpr int64_t kRowsTogether = W == kLanes ? 16 : 24;
// Columns of a pass over a tile that later passes find in the first-level cache.
constexpr int64_t kColumnsInL1 = 512;
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

// In a register, for what several operations share: the compiler would read it anew for each. Without
// registers of the width, as in builds for tests, it stays as the compiler has it.
template <int W>
NABLA_FAST_INLINE Floats<W> in_register(Floats<W> x) {
#if NABLA_FAST_X86
  if constexpr (W == 16 && NABLA_FAST_AVX512)
    asm("" : "+v"(x));
  else if constexpr (W == 4 || (W == 8 && NABLA_FAST_AVX2))
    asm("" : "+x"(x));
#endif
  return x;
}

// The same address, of which the compiler no longer knows that registers could stand for it.
NABLA_FAST_INLINE float* in_memory(float* x) {
  asm volatile("" : "+r"(x) : : "memory");
  return x;
}

// total[r * kTokensInRegisters + t] += the products of one vector of three rows. Twelve sums, the rows'
// numbers and a token's fill 16 registers: 7 loads for 12 multiply-adds, where two rows need 6 for 8.
// The rest is as of add_products().
template <int W, bool kPrefetch, typename T>
NABLA_FAST_INLINE void add_products_of_three(const float* const* h, const T* const* w,
                                             int64_t first, int64_t last, int lane, int64_t ahead,
                                             int pass, int passes, Floats<W>* total) {
  for (int64_t k = first; k < last; k += kLanes) {
    Floats<W> states[3];
#pragma GCC unroll 3
    for (int r = 0; r < 3; ++r) states[r] = load<W>(h[r] + k + lane);
#pragma GCC unroll 4
    for (int t = 0; t < kTokensInRegisters; ++t) {
      const Floats<W> weight = load_fp32<W>(w[t] + k + lane);
#pragma GCC unroll 3
      for (int r = 0; r < 3; ++r) total[r * kTokensInRegisters + t] += states[r] * weight;
      if (kPrefetch && t % passes == pass) __builtin_prefetch(w[t] + k + ahead);
    }
  }
}

// total[(r * kTokensInRegisters + t) * P + p] += the products of vector p of P from lane `lane` on,
// of columns [first, last), whole Lanes. Of tokens t for which t % passes == pass it prefetches what
// lies `ahead` elements further, if kPrefetch.
template <int W, int R, int P, bool kPrefetch, typename T>
NABLA_FAST_INLINE void add_products(const float* const* h, const T* const* w, int64_t first,
                                    int64_t last, int lane, int64_t ahead, int pass, int passes,
                                    Floats<W>* total) {
  for (int64_t k = first; k < last; k += kLanes) {
    Floats<W> weights[kTokensInRegisters * P];
#pragma GCC unroll 4
    for (int t = 0; t < kTokensInRegisters; ++t) {
#pragma GCC unroll 2
      for (int p = 0; p < P; ++p)
        weights[t * P + p] = in_register<W>(load_fp32<W>(w[t] + k + lane + p * W));
      // An address, not an access: behind the head's end it does nothing.
      if (kPrefetch && t % passes == pass) __builtin_prefetch(w[t] + k + ahead);
    }
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) {
#pragma GCC unroll 2
      for (int p = 0; p < P; ++p) {
        Floats<W> state = load<W>(h[r] + k + lane + p * W);
#pragma GCC unroll 4
        for (int t = 0; t < kTokensInRegisters; ++t)
          total[(r * kTokensInRegisters + t) * P + p] += state * weights[t * P + p];
      }
    }
  }
}

// One of the passes of add_products_in_passes().
template <int W, int R, bool kPrefetch, typename T>
NABLA_FAST_INLINE void add_products_of_part(const float* const* h, const T* const* w, int64_t first,
                                            int64_t last, int lane, int64_t ahead, int pass,
                                            int passes, float* total) {
  constexpr int P = R == 1 ? 2 : 1;
  Floats<W> part[R * kTokensInRegisters * P];
#pragma GCC unroll 12
  for (int n = 0; n < R * kTokensInRegisters * P; ++n)
    part[n] = load<W>(total + n / P * kLanes + lane + n % P * W);
  if constexpr (R == 3)
    add_products_of_three<W, kPrefetch, T>(h, w, first, last, lane, ahead, pass, passes, part);
  else
    add_products<W, R, P, kPrefetch, T>(h, w, first, last, lane, ahead, pass, passes, part);
#pragma GCC unroll 12
  for (int n = 0; n < R * kTokensInRegisters * P; ++n)
    store<W>(total + n / P * kLanes + lane + n % P * W, part[n]);
}

// total[r * kTokensInRegisters + t] += the products of all lanes of `R` rows where there are only 16
// registers, of W < kLanes numbers: eight sums are in them at once, of two rows or of one, or the twelve
// of three. Passes after the first find the columns in the first-level cache.
template <int W, int R, bool kPrefetch, typename T>
NABLA_FAST_INLINE void add_products_in_passes(const float* const* h, const T* const* w,
                                              int64_t columns, int64_t ahead, Lanes* total) {
  constexpr int kTogether = R == 4 ? 2 : R, kStep = R == 1 ? 2 * W : W;
  constexpr int kOfRows = kLanes / kStep, kPasses = R / kTogether * kOfRows;
  // In memory between passes: registers for all of them would be taken from the sums at work.
  float* sums = in_memory(reinterpret_cast<float*>(total));
  for (int64_t first = 0; first < columns; first += kColumnsInL1) {
    const int64_t last = std::min(columns, first + kColumnsInL1);
#pragma GCC unroll 8
    for (int n = 0; n < kPasses; ++n) {
      const int r = n / kOfRows * kTogether;
      add_products_of_part<W, kTogether, kPrefetch, T>(h + r, w, first, last, n % kOfRows * kStep,
                                                       ahead, n, kPasses,
                                                       sums + r * kTokensInRegisters * kLanes);
    }
  }
}

// logits[r * stride + t] of `R` rows from `row` on and four tokens from `token` on, of which the
// first `tokens` are stored. Summed in 16 lanes over the width, and the lanes in a tree: in one
// order.
template <int W, int R, bool kPrefetch, typename T>
NABLA_FAST_INLINE void dot_tile(const HeadProduct& p, int64_t row, int64_t token, int tokens,
                                float* logits, int64_t stride) {
  const T* w[kTokensInRegisters];
#pragma GCC unroll 4
  for (int t = 0; t < kTokensInRegisters; ++t)
    w[t] = static_cast<const T*>(p.head) + (token + std::min(t, tokens - 1)) * p.head_stride;
  const float* h[R];
#pragma GCC unroll 4
  for (int r = 0; r < R; ++r) h[r] = p.hidden + (row + r) * p.hidden_stride;
  Lanes total[kMostRowsInRegisters * kTokensInRegisters] = {};
  int64_t tile_bytes = kTokensInRegisters * static_cast<int64_t>(sizeof(T)) * p.width;
  int64_t ahead = (kPrefetchBytes / (tile_bytes + 1) + 1) * kTokensInRegisters * p.head_stride;
  int64_t whole = p.width - p.width % kLanes;
  if constexpr (W == kLanes)
    add_products<W, R, 1, kPrefetch, T>(h, w, 0, whole, 0, ahead, 0, 1, total);
  else
    add_products_in_passes<W, R, kPrefetch, T>(h, w, whole, ahead, total);
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
  store(result, lane_sums<W>(total));
#pragma GCC unroll 4
  for (int r = 0; r < R; ++r)
    std::memcpy(logits + r * stride, result + r * kTokensInRegisters,
                sizeof(float) * static_cast<size_t>(tokens));
}

// logits[(r - first) * stride + t] of rows [first, last) and up to four tokens.
template <int W, bool kPrefetch, typename T>
NABLA_FAST_INLINE void dot_column(const HeadProduct& p, int64_t first, int64_t last, int64_t token,
                                  int tokens, float* logits, int64_t stride) {
  // Where there are 16 registers, threes are faster of a bf16 head, whose numbers are converted once for
  // them; of a float32 head pairs are, two a tile.
  constexpr int kRows = W < kLanes && sizeof(T) == 2 ? 3 : 4;
  // A row by itself is slow there: it shares the tiles of those before it.
  const bool shares = W < kLanes && (last - first) % kRows == 1 && last - first > kRows &&
                      (kRows == 3 || last - first == 5);
  const int64_t end = last - (shares ? kRows : 0);
  int64_t row = first;
  if (kPrefetch && row + kRows <= end) {
    dot_tile<W, kRows, true, T>(p, row, token, tokens, logits, stride);
    row += kRows;
  }
  for (; row + kRows <= end; row += kRows)
    dot_tile<W, kRows, false, T>(p, row, token, tokens, logits + (row - first) * stride, stride);
  if (last - row == 5 || last - row == 3) {
    dot_tile<W, 3, kPrefetch, T>(p, row, token, tokens, logits + (row - first) * stride, stride);
    row += 3;
  }
  for (; row + 2 <= last; row += 2)
    dot_tile<W, 2, kPrefetch, T>(p, row, token, tokens, logits + (row - first) * stride, stride);
  if (row < last)
    dot_tile<W, 1, kPrefetch, T>(p, row, token, tokens, logits + (row - first) * stride, stride);
}

// out[r * stride + t - first] of all rows and tokens [first, last), at most kTokensInL2. The first
// rows read the tokens from memory, and the others from the second-level cache.
template <int W, typename T>
NABLA_FAST_INLINE void dot_block(const HeadProduct& p, int64_t first, int64_t last, float* out,
                                 int64_t stride) {
  for (int64_t row = 0; row < p.rows; row += kRowsTogether<W>) {
    const int64_t end = std::min(p.rows, row + kRowsTogether<W>);
    for (int64_t token = first; token < last; token += kTokensInRegisters) {
      const int tokens = static_cast<int>(std::min<int64_t>(kTokensInRegisters, last - token));
      float* to = out + row * stride + token - first;
      if (row == 0)
        dot_column<W, true, T>(p, row, end, token, tokens, to, stride);
      else
        dot_column<W, false, T>(p, row, end, token, tokens, to, stride);
    }
  }
}

}  // namespace nabla_fast::gemm

#endif  // NABLA_FAST_CPU_GEMM_DOT_PRODUCTS_H_
