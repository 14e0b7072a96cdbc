// What the two products of tiles.h share on the CPU's matrix unit: squares of sums in its registers.
#ifndef NABLA_FAST_CPU_AMX_H_
#define NABLA_FAST_CPU_AMX_H_

#include <cstdint>

#include "isa.h"

#if NABLA_FAST_X86 && defined(__linux__)
  #define NABLA_FAST_AMX 1
  #include <immintrin.h>
  #define NABLA_FAST_TARGET_AMX \
    __attribute__((target(      \
        "amx-tile,amx-bf16,avx512f,avx512bw,avx512cd,avx512dq,avx512vl,avx2,fma,f16c,bmi,bmi2")))
#else
  #define NABLA_FAST_AMX 0
#endif

namespace nabla_fast::cpu {

// Of a tile: numbers that are multiplied and added up, and those beside each other.
constexpr int kDepth = 32;
constexpr int kSide = 16;
// Terms of a float32.
constexpr int kTerms = 3;

#if NABLA_FAST_AMX

// All tiles 16 x 64 bytes.
struct alignas(64) TileShapes {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
  uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};

// Sums of 32 x 32: registers 0 to 3, of which a narrower one uses 0 and 2, a lower one 0 and 1.
struct Square {
  float* at;
  int64_t down;  // bytes
  bool low, narrow;
};

NABLA_FAST_TARGET_AMX inline void load_square(const Square& c) {
  float* below = c.at + kSide * (c.down / 4);
  _tile_loadd(0, c.at, c.down);
  if (!c.narrow) _tile_loadd(1, c.at + kSide, c.down);
  if (!c.low) _tile_loadd(2, below, c.down);
  if (!c.low && !c.narrow) _tile_loadd(3, below + kSide, c.down);
}

NABLA_FAST_TARGET_AMX inline void store_square(const Square& c) {
  float* below = c.at + kSide * (c.down / 4);
  _tile_stored(0, c.at, c.down);
  if (!c.narrow) _tile_stored(1, c.at + kSide, c.down);
  if (!c.low) _tile_stored(2, below, c.down);
  if (!c.low && !c.narrow) _tile_stored(3, below + kSide, c.down);
}

#endif

}  // namespace nabla_fast::cpu

#endif  // NABLA_FAST_CPU_AMX_H_
