// Squares of sums in the registers of the CPU's matrix unit, for both products of vocab_tiles.h.
#ifndef NABLA_FAST_CPU_GEMM_AMX_TILES_H_
#define NABLA_FAST_CPU_GEMM_AMX_TILES_H_

#include <cstdint>

#include "base/isa.h"
#include "gemm/amx_unit.h"

namespace nabla_fast::gemm {

// Sides of a tile: numbers that are multiplied and added up, and those beside each other.
constexpr int kAmxDepth = 32;
constexpr int kAmxSide = 16;
// bf16 terms of an fp32 number.
constexpr int kBf16Terms = 3;

#if NABLA_FAST_AMX

// Sums of 32 x 32: registers 0 to 3, of which a narrower one uses 0 and 2, a lower one 0 and 1.
struct Square {
  float* at;
  int64_t down;  // bytes
  bool low, narrow;
};

NABLA_FAST_TARGET_AMX inline void load_square(const Square& c) {
  float* below = c.at + kAmxSide * (c.down / 4);
  load_tile<0>(c.at, c.down);
  if (!c.narrow) load_tile<1>(c.at + kAmxSide, c.down);
  if (!c.low) load_tile<2>(below, c.down);
  if (!c.low && !c.narrow) load_tile<3>(below + kAmxSide, c.down);
}

NABLA_FAST_TARGET_AMX inline void store_square(const Square& c) {
  float* below = c.at + kAmxSide * (c.down / 4);
  store_tile<0>(c.at, c.down);
  if (!c.narrow) store_tile<1>(c.at + kAmxSide, c.down);
  if (!c.low) store_tile<2>(below, c.down);
  if (!c.low && !c.narrow) store_tile<3>(below + kAmxSide, c.down);
}

#endif

}  // namespace nabla_fast::gemm

#endif  // NABLA_FAST_CPU_GEMM_AMX_TILES_H_
