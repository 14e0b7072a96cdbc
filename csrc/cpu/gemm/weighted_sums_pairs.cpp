// add_weighted_sums() of bf16 weights and a bf16 table by dot products of pairs of tokens.
//
// The table's pairs are laid side by side, 64 columns at a time, which stay in the first-level
// cache while all rows pass over them.

#include "gemm/weighted_sums_pairs.h"

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <utility>

#include "base/isa.h"
#include "base/prefetch.h"
#include "gemm/vocab_tiles.h"
#include "simd/bf16_dot.h"
#include "simd/vec.h"

namespace nabla_fast::gemm {

#if NABLA_FAST_BF16_DOT

namespace {

constexpr int kPairs = kVocabTileTokens / 2;
constexpr int kStripColumns = 64;
// Rows in registers: with a strip's four vectors sixteen sums, of which none waits for another.
constexpr int kRows = 4;
constexpr int kPairsPerPrefetch = 4;

using Words = VecTypes<16>::Bits;

// Pairs of tokens, the first in the lower halves of words.
struct Weights {
  alignas(64) uint16_t pairs[kPairs][2 * kRowsPerGroup];
};
// Of every 32 columns the even ones lie before the odd ones: words of two neighbours become those
// of two tokens without a shuffle.
struct Strip {
  alignas(64) float pairs[kPairs][kStripColumns];
};

NABLA_FAST_INLINE Words lower_halves(Words lower, Words upper) {
  return (lower & 0xFFFFu) | upper << 16;
}
NABLA_FAST_INLINE Words upper_halves(Words lower, Words upper) {
  return lower >> 16 | (upper & 0xFFFF0000u);
}

NABLA_FAST_INLINE void pack_weights(const float* weights, int lanes, int tokens, Weights& to) {
  for (int t = 0; t < tokens; t += 2) {
    for (int r = 0; r < lanes; r += 16) {
      const float* const at = weights + t * lanes + r;
      const Words pairs =
          upper_halves((Words)load<16>(at), t + 1 < tokens ? (Words)load<16>(at + lanes) : Words{});
      std::memcpy(to.pairs[t / 2] + 2 * r, &pairs, sizeof pairs);
    }
  }
}

// 32 columns of two tokens.
NABLA_FAST_INLINE void pack_columns(const void* first, const void* second, float* to) {
  Words a, b;
  std::memcpy(&a, first, sizeof a);
  std::memcpy(&b, second, sizeof b);
  store<16>(to, (Floats<16>)lower_halves(a, b));
  store<16>(to + 16, (Floats<16>)upper_halves(a, b));
}

NABLA_FAST_INLINE void pack_strip(const uint16_t* w, int64_t stride, int64_t columns, int tokens,
                                  Prefetcher* prefetcher, Strip& to) {
  constexpr uint16_t kZeros[kStripColumns] = {};
  for (int t = 0; t < tokens; t += 2) {
    const uint16_t* first = w + t * stride;
    const uint16_t* second = t + 1 < tokens ? first + stride : kZeros;
    uint16_t ends[2][kStripColumns];
    if (prefetcher) prefetcher->advance<4 * kStripColumns>();
    if (columns < kStripColumns) {
      std::memset(ends, 0, sizeof ends);
      std::memcpy(ends[0], first, sizeof(uint16_t) * static_cast<size_t>(columns));
      std::memcpy(ends[1], second, sizeof(uint16_t) * static_cast<size_t>(columns));
      first = ends[0];
      second = ends[1];
    }
  #pragma GCC unroll 2
    for (int k = 0; k < kStripColumns; k += 32)
      pack_columns(first + k, second + k, to.pairs[t / 2] + k);
  }
}

template <int... kLane>
NABLA_FAST_INLINE Floats<16> interleaved(Floats<16> even, Floats<16> odd, int from,
                                         std::integer_sequence<int, kLane...>) {
  return from ? __builtin_shufflevector(even, odd, (8 + kLane / 2 + kLane % 2 * 16)...)
              : __builtin_shufflevector(even, odd, (kLane / 2 + kLane % 2 * 16)...);
}

NABLA_FAST_INLINE void add_to(float* sums, Floats<16> x) { store<16>(sums, load<16>(sums) + x); }

// `R` rows and 2 `C` vectors of columns, of which `columns` have room in the sums.
template <int R, int C>
NABLA_FAST_INLINE void add_register_tile(const uint16_t* weights, const float* pairs, int count,
                                         int64_t columns, float* sums, int64_t sums_stride,
                                         LinePrefetcher& prefetcher) {
  constexpr std::make_integer_sequence<int, 16> kLanes;
  Floats<16> total[R][2 * C] = {};
  for (int p = 0; p < count; ++p) {
    if (p % kPairsPerPrefetch == 0) prefetcher.advance();
    Words column[2 * C];
  #pragma GCC unroll 4
    for (int c = 0; c < 2 * C; ++c) column[c] = (Words)load<16>(pairs + p * kStripColumns + 16 * c);
  #pragma GCC unroll 4
    for (int r = 0; r < R; ++r) {
      const Words weight = broadcast_pair(weights + 2 * (p * kRowsPerGroup + r));
  #pragma GCC unroll 4
      for (int c = 0; c < 2 * C; ++c) add_bf16_dot(total[r][c], weight, column[c]);
    }
  }
  #pragma GCC unroll 4
  for (int r = 0; r < R; ++r) {
  #pragma GCC unroll 2
    for (int c = 0; c < 2 * C; c += 2) {
      float* const out = sums + r * sums_stride + 16 * c;
      add_to(out, interleaved(total[r][c], total[r][c + 1], 0, kLanes));
      if (16 * c + 16 < columns)
        add_to(out + 16, interleaved(total[r][c], total[r][c + 1], 1, kLanes));
    }
  }
}

template <int R>
NABLA_FAST_INLINE void add_strip(const uint16_t* weights, const Strip& strip, int64_t columns,
                                 int count, float* sums, int64_t sums_stride,
                                 LinePrefetcher& prefetcher) {
  if (columns > kStripColumns / 2)
    add_register_tile<R, 2>(weights, strip.pairs[0], count, columns, sums, sums_stride, prefetcher);
  else
    add_register_tile<R, 1>(weights, strip.pairs[0], count, columns, sums, sums_stride, prefetcher);
}

}  // namespace

NABLA_FAST_TARGET_AVX512 void add_weighted_sums_pairs(const float* weights, int lanes, int rows,
                                                      const Table& table, int tokens, float* sums,
                                                      Prefetcher prefetcher) {
  const auto* w = static_cast<const uint16_t*>(table.data);
  const int64_t sums_stride = padded(table.width);
  const int count = (tokens + 1) / 2;
  // Few rows leave no time between packing and packing. More do: there the two lines of each of the
  // next tokens are fetched during the products of a strip of these.
  const bool few = rows < 4 * kRows;
  const int steps =
      (rows + kRows - 1) / kRows * ((count + kPairsPerPrefetch - 1) / kPairsPerPrefetch);
  LinePrefetcher lines{prefetcher.next, few ? 0 : (2 * tokens + steps - 1) / steps};
  Weights packed;
  Strip strip;
  pack_weights(weights, lanes, tokens, packed);
  for (int64_t k = 0; k < table.width; k += kStripColumns) {
    const int64_t columns = std::min<int64_t>(kStripColumns, table.width - k);
    pack_strip(w + k, table.stride, columns, tokens, few ? &prefetcher : nullptr, strip);
    int r = 0;
    for (; r + kRows <= rows; r += kRows)
      add_strip<kRows>(packed.pairs[0] + 2 * r, strip, columns, count, sums + r * sums_stride + k,
                       sums_stride, lines);
    for (; r < rows; ++r)
      add_strip<1>(packed.pairs[0] + 2 * r, strip, columns, count, sums + r * sums_stride + k,
                   sums_stride, lines);
  }
}

#else

void add_weighted_sums_pairs(const float*, int, int, const Table&, int, float*, Prefetcher) {}

#endif

}  // namespace nabla_fast::gemm
