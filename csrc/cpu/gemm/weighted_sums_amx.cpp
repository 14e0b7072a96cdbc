// add_weighted_sums() of a bf16 table on the CPU's matrix unit.
//
// Both factors are packed for the unit, anew for each tile: weights transposed, as three bf16
// terms, or as one where they are bf16 numbers; the table, 32 columns at a time, as pairs of tokens
// side by side.

#include <algorithm>
#include <cstdint>
#include <cstring>

#include "base/prefetch.h"
#include "gemm/amx.h"
#include "gemm/amx_tiles.h"
#include "gemm/amx_unit.h"
#include "gemm/vocab_tiles.h"
#include "simd/vec.h"

namespace nabla_fast::gemm {

#if NABLA_FAST_AMX

namespace {

constexpr int kPanelColumns = 2 * kAmxSide;  // at a time
constexpr int kPanelDepths = kMostSumTokens / kAmxDepth;

typedef uint16_t Words __attribute__((vector_size(64)));

// Weights of 16 rows and 32 tokens.
using LeftTile = uint16_t[kAmxSide][kAmxDepth];

// Of a block, depth after depth, all terms of one.
struct Left {
  alignas(64) LeftTile tiles[kRowsPerGroup / kAmxSide][kPanelDepths * kBf16Terms];
};

struct Right {
  alignas(64) uint16_t pairs[kMostSumTokens / 2][2][2 * kAmxSide];  // by 16 columns
};

// Terms of 16 weights of each of 16 rows, to columns [column, column + 16) of tiles.
NABLA_FAST_INLINE void split_weights(const Floats<kAmxSide> (&weights)[kAmxSide], LeftTile* tiles,
                                     int column) {
  using Bits = typename VecTypes<kAmxSide>::Bits;
  typedef uint16_t Halves __attribute__((vector_size(2 * kAmxSide)));
  #pragma GCC unroll 16
  for (int r = 0; r < kAmxSide; ++r) {
    Floats<kAmxSide> rest = weights[r];
  #pragma GCC unroll 3
    for (int term = 0; term < kBf16Terms; ++term) {
      // A NaN may have all its payload in the lower bits; infinity has no remainder.
      const Bits begin = rest == rest ? (Bits)rest & 0xFFFF0000u : Bits{} + 0x7FC00000u;
      const Halves halves = __builtin_convertvector(begin >> 16, Halves);
      std::memcpy(tiles[term][r] + column, &halves, sizeof halves);
      rest -= (Floats<kAmxSide>)begin;
      rest = rest == rest ? rest : Floats<kAmxSide>{};
    }
  }
}

// Weights that are bf16 numbers, as one term: pairs of tokens, and these transposed.
NABLA_FAST_TARGET_AMX void pack_bf16_left(const float* weights, int lanes, int tokens, Left& left) {
  using Bits = typename VecTypes<kAmxSide>::Bits;
  for (int block = 0; block * kAmxSide < lanes; ++block) {
    for (int depth = 0; depth * kAmxDepth < tokens; ++depth) {
      Bits pairs[kAmxSide];
  #pragma GCC unroll 16
      for (int n = 0; n < kAmxSide; ++n) {
        const int t = depth * kAmxDepth + 2 * n;
        const float* const at = weights + t * lanes + block * kAmxSide;
        const Bits lower = t < tokens ? (Bits)load<kAmxSide>(at) : Bits{};
        const Bits upper = t + 1 < tokens ? (Bits)load<kAmxSide>(at + lanes) : Bits{};
        pairs[n] = lower >> 16 | (upper & 0xFFFF0000u);
      }
      transpose<kAmxSide>(pairs);
      std::memcpy(left.tiles[block][depth], pairs, sizeof pairs);
    }
  }
}

NABLA_FAST_TARGET_AMX void pack_left(const float* weights, int lanes, int tokens, Left& left) {
  for (int block = 0; block * kAmxSide < lanes; ++block) {
    for (int t = 0; t < (tokens + kAmxDepth - 1) / kAmxDepth * kAmxDepth; t += kAmxSide) {
      Floats<kAmxSide> x[kAmxSide];
  #pragma GCC unroll 16
      for (int n = 0; n < kAmxSide; ++n)
        x[n] = t + n < tokens ? load<kAmxSide>(weights + (t + n) * lanes + block * kAmxSide)
                              : Floats<kAmxSide>{};
      transpose<kAmxSide>(x);
      split_weights(x, left.tiles[block] + t / kAmxDepth * kBf16Terms, t % kAmxDepth);
    }
  }
}

template <int... kWord>
NABLA_FAST_INLINE Words interleaved(Words a, Words b, int half,
                                    std::integer_sequence<int, kWord...>) {
  return half ? __builtin_shufflevector(a, b, (kAmxSide + kWord / 2 + kWord % 2 * 32)...)
              : __builtin_shufflevector(a, b, (kWord / 2 + kWord % 2 * 32)...);
}

NABLA_FAST_INLINE Words load_words(const uint16_t* from, int64_t columns) {
  Words words = {};
  if (columns == kPanelColumns)
    std::memcpy(&words, from, sizeof words);
  else
    std::memcpy(&words, from, static_cast<size_t>(2 * columns));
  return words;
}

// right = pairs of all tokens. Returns whether all numbers are finite.
NABLA_FAST_TARGET_AMX inline bool pack_right(const uint16_t* w, int64_t stride, int64_t columns,
                                             int tokens, Prefetcher* prefetcher, Right& right) {
  Words largest = {};
  const int end = (tokens + kAmxDepth - 1) / kAmxDepth * kAmxDepth;
  for (int t = 0; t < end; t += 2) {
    const Words a = t < tokens ? load_words(w + t * stride, columns) : Words{};
    const Words b = t + 1 < tokens ? load_words(w + (t + 1) * stride, columns) : Words{};
    const Words size_a = a & 0x7FFF, size_b = b & 0x7FFF;
    largest = largest > size_a ? largest : size_a;
    largest = largest > size_b ? largest : size_b;
    constexpr std::make_integer_sequence<int, 32> kWords;
    const Words pairs[2] = {interleaved(a, b, 0, kWords), interleaved(a, b, 1, kWords)};
    std::memcpy(right.pairs[t / 2], pairs, sizeof pairs);
    if (prefetcher) prefetcher->add_lines(2);
  }
  uint16_t most = 0;
  for (int n = 0; n < 32; ++n) most = std::max<uint16_t>(most, largest[n]);
  return most < 0x7F80;
}

// A square of sums += weights times pairs.
NABLA_FAST_TARGET_AMX inline void multiply(const Left& left, int block, const Right& right,
                                           int depths, int terms, LinePrefetcher& prefetcher,
                                           const Square& c) {
  load_square(c);
  for (int depth = 0; depth < depths; ++depth) {
    prefetcher.advance();
    load_tile<6>(right.pairs[depth * kAmxDepth / 2][0], sizeof right.pairs[0]);
    if (!c.narrow) load_tile<7>(right.pairs[depth * kAmxDepth / 2][1], sizeof right.pairs[0]);
    for (int term = 0; term < terms; ++term) {
      load_tile<4>(left.tiles[block][depth * terms + term], sizeof left.tiles[0][0][0]);
      add_tile_product<0, 4, 6>();
      if (!c.narrow) add_tile_product<1, 4, 7>();
      if (term == 0) prefetcher.advance();
      if (c.low) continue;
      load_tile<5>(left.tiles[block + 1][depth * terms + term], sizeof left.tiles[0][0][0]);
      add_tile_product<2, 5, 6>();
      if (!c.narrow) add_tile_product<3, 5, 7>();
    }
  }
  store_square(c);
}

NABLA_FAST_INLINE void copy_rows(const float* from, int64_t from_stride, int rows, int width,
                                 float* to, int64_t to_stride) {
  for (int n = 0; n < rows; ++n)
    for (int k = 0; k < width; k += kAmxSide)
      store<kAmxSide>(to + n * to_stride + k, load<kAmxSide>(from + n * from_stride + k));
}

// Sums in fp32, for columns with infinities: of infinity times a term that is 0, the matrix unit
// makes NaN.
void add_in_fp32(const float* weights, int lanes, int rows, const uint16_t* w, int64_t stride,
                 int64_t columns, int tokens, float* sums, int64_t sums_stride) {
  for (int r = 0; r < rows; ++r) {
    for (int64_t k = 0; k < columns; ++k) {
      float sum = 0;
      for (int t = 0; t < tokens; ++t)
        sum += weights[t * lanes + r] * bf16_to_fp32(w[t * stride + k]);
      sums[r * sums_stride + k] += sum;
    }
  }
}

}  // namespace

NABLA_FAST_TARGET_AMX void add_weighted_sums_amx(const float* weights, int lanes, int rows,
                                                 const Table& table, int tokens, float* sums,
                                                 Prefetcher prefetcher, bool bf16_weights) {
  configure_tiles(TileShapes{});
  const auto* w = static_cast<const uint16_t*>(table.data);
  const int64_t sums_stride = padded(table.width);
  const int depths = (tokens + kAmxDepth - 1) / kAmxDepth, terms = bf16_weights ? 1 : kBf16Terms;
  // Few rows leave no time between packing and packing. More do: there a panel of the next tokens, a
  // line of each, is fetched during the products of one of these.
  const bool few = rows <= 2 * kAmxSide;
  const int steps = 2 * depths * ((rows + 2 * kAmxSide - 1) / (2 * kAmxSide));
  LinePrefetcher lines{prefetcher.next, few ? 0 : (tokens + steps - 1) / steps};
  Left left;
  Right right;
  (bf16_weights ? pack_bf16_left : pack_left)(weights, lanes, tokens, left);
  for (int64_t k = 0; k < table.width; k += kPanelColumns) {
    const int64_t columns = std::min<int64_t>(kPanelColumns, table.width - k);
    if (!pack_right(w + k, table.stride, columns, tokens, few ? &prefetcher : nullptr, right)) {
      add_in_fp32(weights, lanes, rows, w + k, table.stride, columns, tokens, sums + k,
                  sums_stride);
      continue;
    }
    const bool narrow = columns <= kAmxSide;
    for (int r = 0; r < rows; r += 2 * kAmxSide) {
      const int some = std::min(2 * kAmxSide, rows - r);
      float* const out = sums + r * sums_stride + k;
      if (some % kAmxSide == 0) {
        multiply(left, r / kAmxSide, right, depths, terms, lines,
                 {out, 4 * sums_stride, some == kAmxSide, narrow});
        continue;
      }
      // A tile has sixteen rows, and there are fewer.
      alignas(64) float edge[2 * kAmxSide][kPanelColumns];
      const int width = narrow ? kAmxSide : kPanelColumns;
      copy_rows(out, sums_stride, some, width, edge[0], kPanelColumns);
      multiply(left, r / kAmxSide, right, depths, terms, lines,
               {edge[0], sizeof edge[0], some < kAmxSide, narrow});
      copy_rows(edge[0], kPanelColumns, some, width, out, sums_stride);
    }
  }
  release_tiles();
}

#else

void add_weighted_sums_amx(const float*, int, int, const Table&, int, float*, Prefetcher, bool) {}

#endif

}  // namespace nabla_fast::gemm
