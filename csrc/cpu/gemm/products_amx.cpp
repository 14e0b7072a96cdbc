#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>

#include "base/isa.h"
#include "base/prefetch.h"
#include "gemm/amx.h"
#include "gemm/amx_tiles.h"
#include "gemm/amx_unit.h"
#include "simd/vec.h"

namespace nabla_fast::gemm {
namespace {

// The upper 16 bits of x as bf16; the remainder x - high_bf16(x) has the same sign, and eight bits
// less.
uint16_t high_bf16(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  // A NaN may have all its payload in the lower bits.
  return std::isnan(x) ? kBf16NaN : static_cast<uint16_t>(bits >> 16);
}

// Product of `row` with w [width] in fp32, for infinities: of infinity times a term that is 0, the
// matrix unit makes NaN.
float fp32_product(const PackedRows& rows, int row, const uint16_t* w) {
  const auto* x = static_cast<const uint16_t*>(rows.data);
  float sum = 0;
  for (int64_t k = 0; k < rows.width; ++k) {
    float value = 0;
    for (int term = 0; term < rows.terms; ++term)
      value += bf16_to_fp32(x[2 * ((k / 2 * rows.terms + term) * rows.lanes() + row) + k % 2]);
    sum += value * bf16_to_fp32(w[k]);
  }
  return sum;
}

// Whether all of n numbers are, n a multiple of 16.
template <int W>
NABLA_FAST_INLINE bool all_finite_kernel(const float* x, int n) {
  Floats<W> zeros = {};
  for (int i = 0; i < n; i += W) zeros += load<W>(x + i) - load<W>(x + i);
  return lane_sum<W>(zeros) == 0;
}

template <int W>
NABLA_FAST_INLINE void add_or_copy_kernel(const float* x, int n, bool add, float* z) {
  for (int i = 0; i < n; i += W)
    store<W>(z + i, add ? load<W>(z + i) + load<W>(x + i) : load<W>(x + i));
}

NABLA_FAST_FOR_EACH_ISA(all_finite, all_finite_kernel<W>)
NABLA_FAST_FOR_EACH_ISA(add_or_copy, add_or_copy_kernel<W>)

#if NABLA_FAST_AMX

// A matrix of tiles in memory: `down` bytes from one row of a tile to the next, `right` to the tile
// of the next sixteen beside it, `term` to the next term.
struct Tiles {
  const char* at;
  int64_t down, right, term;
};

// 32 x 32 times 32 x 32; `terms` of the right side.
NABLA_FAST_TARGET_AMX inline void multiply(const Tiles& a, const Tiles& b, int terms,
                                           const Square& c) {
  load_tile<4>(a.at, a.down);
  if (!c.low) load_tile<5>(a.at + a.right, a.down);
  const char* of_b = b.at;
  for (int term = 0; term < terms; ++term, of_b += b.term) {
    load_tile<6>(of_b, b.down);
    add_tile_product<0, 4, 6>();
    if (!c.narrow) {
      load_tile<7>(of_b + b.right, b.down);
      add_tile_product<1, 4, 7>();
    }
    if (!c.low) {
      add_tile_product<2, 5, 6>();
      if (!c.narrow) add_tile_product<3, 5, 7>();
    }
  }
}

// z += products of at most 32 tokens; z has room for whole tiles.
NABLA_FAST_TARGET_AMX inline void add_tokens(const PackedRows& rows, const Table& table, int tokens,
                                             float* z, Prefetcher& prefetcher) {
  const auto* w = static_cast<const uint16_t*>(table.data);
  const int lanes = rows.lanes(), squares = (lanes + 2 * kAmxSide - 1) / (2 * kAmxSide);
  const int lines = 2 * kAmxSide * kAmxDepth * 2 / 64 / squares;
  // Zeros where the unit reads rows that are not there, or columns behind a row's last.
  alignas(64) uint16_t copy[2 * kAmxSide][kAmxDepth];
  for (int lane = 0; lane < lanes; lane += 2 * kAmxSide) {
    const Square c{z + lane, 4 * lanes, tokens <= kAmxSide, lanes - lane == kAmxSide};
    load_square(c);
    for (int64_t k = 0; k < rows.width; k += kAmxDepth) {
      const int64_t columns = std::min<int64_t>(kAmxDepth, rows.width - k), of_term = 4 * lanes;
      Tiles a{reinterpret_cast<const char*>(w + k), 2 * table.stride, 2 * kAmxSide * table.stride,
              0};
      if (columns < kAmxDepth || tokens % kAmxSide) {
        std::memset(copy, 0, sizeof copy);
        for (int t = 0; t < tokens; ++t)
          std::memcpy(copy[t], w + t * table.stride + k, static_cast<size_t>(2 * columns));
        a = {reinterpret_cast<const char*>(copy), sizeof copy[0], kAmxSide * sizeof copy[0], 0};
      }
      const Tiles b{static_cast<const char*>(rows.data) + k / 2 * rows.terms * of_term + 4 * lane,
                    rows.terms * of_term, 4 * kAmxSide, of_term};
      for (int line = 0; line < lines; ++line) prefetcher.add_line();
      multiply(a, b, rows.terms, c);
    }
    store_square(c);
  }
}

// z += products; z has room for whole tiles of tokens.
NABLA_FAST_TARGET_AMX void add_products(const PackedRows& rows, const Table& table, int tokens,
                                        float* z) {
  configure_tiles(TileShapes{});
  Prefetcher prefetcher{static_cast<const char*>(table.from(tokens).data)};
  for (int t = 0; t < tokens; t += 2 * kAmxSide) {
    const int count = std::min(2 * kAmxSide, tokens - t);
    add_tokens(rows, table.from(t), count, z + t * rows.lanes(), prefetcher);
  }
  release_tiles();
}

#else

void add_products(const PackedRows&, const Table&, int, float*) {}

#endif

}  // namespace

PackedRows pack_amx(const Table& from, int rows, void* memory) {
  const PackedRows packed{memory, rows, from.width, false,
                          from.dtype == NABLA_FAST_BFLOAT16 ? 1 : kBf16Terms};
  auto* to = static_cast<uint16_t*>(memory);
  const int lanes = packed.lanes();
  const int64_t padded_width = (from.width + kAmxDepth - 1) / kAmxDepth * kAmxDepth;
  std::memset(memory, 0, static_cast<size_t>(2 * padded_width * packed.terms * lanes));
  for (int r = 0; r < rows; ++r) {
    for (int64_t k = 0; k < from.width; ++k) {
      uint16_t* at = to + 2 * (k / 2 * packed.terms * lanes + r) + k % 2;
      float rest = from.value(r, k);
      for (int term = 0; term < packed.terms; ++term, at += 2 * lanes) {
        *at = high_bf16(rest);
        if (!std::isfinite(rest)) break;
        rest -= bf16_to_fp32(*at);
      }
    }
  }
  return packed;
}

void products_amx(const PackedRows& rows, const Table& table, int tokens, bool add, float* z) {
  const int lanes = rows.lanes();
  alignas(64) float sums[kVocabTileTokens * kRowsPerGroup];
  std::fill(sums, sums + (tokens + 2 * kAmxSide - 1) / (2 * kAmxSide) * 2 * kAmxSide * lanes, 0.0f);
  add_products(rows, table, tokens, sums);
  const bool finite = all_finite(sums, tokens * lanes);
  for (int t = 0; t < tokens && !finite; ++t) {
    const uint16_t* w = static_cast<const uint16_t*>(table.data) + t * table.stride;
    for (int r = 0; r < rows.rows; ++r)
      if (!std::isfinite(sums[t * lanes + r])) sums[t * lanes + r] = fp32_product(rows, r, w);
  }
  add_or_copy(sums, tokens * lanes, add, z);
}

}  // namespace nabla_fast::gemm
