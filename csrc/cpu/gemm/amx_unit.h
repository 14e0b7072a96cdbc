// The CPU's matrix unit (Intel AMX): eight tiles of at most 16 rows of 64 bytes, a thread's own.
#ifndef NABLA_FAST_CPU_GEMM_AMX_UNIT_H_
#define NABLA_FAST_CPU_GEMM_AMX_UNIT_H_

#include <cstdint>

#include "base/isa.h"

#if NABLA_FAST_EMULATED
  #include "emulation/units.h"
#endif

#if NABLA_FAST_AMX

namespace nabla_fast::gemm {

// Shapes of the tiles, as the unit reads them.
struct alignas(64) TileShapes {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
  uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};

// The compiler's intrinsics are macros that take a tile's number as written; and gcc 12's load does
// not tell the compiler that it reads memory.

NABLA_FAST_INLINE void configure_tiles(const TileShapes& shapes) {
  #if NABLA_FAST_EMULATED
  emulated::load_config(&shapes);
  #else
  asm volatile("ldtilecfg %0" : : "m"(shapes));
  #endif
}

// Tiles hold nothing then, and cost nothing when the system changes threads.
NABLA_FAST_INLINE void release_tiles() {
  #if NABLA_FAST_EMULATED
  emulated::release();
  #else
  asm volatile("tilerelease");
  #endif
}

// Rows of a tile, `stride` bytes apart.
template <int kTile>
NABLA_FAST_INLINE void load_tile(const void* from, int64_t stride) {
  static_assert(kTile >= 0 && kTile < 8);
  #if NABLA_FAST_EMULATED
  emulated::load_tile(kTile, from, stride);
  #else
  asm volatile("tileloadd (%0,%1,1), %%tmm%c2" : : "r"(from), "r"(stride), "i"(kTile) : "memory");
  #endif
}
template <int kTile>
NABLA_FAST_INLINE void store_tile(void* to, int64_t stride) {
  static_assert(kTile >= 0 && kTile < 8);
  #if NABLA_FAST_EMULATED
  emulated::store_tile(kTile, to, stride);
  #else
  asm volatile("tilestored %%tmm%c2, (%0,%1,1)" : : "r"(to), "r"(stride), "i"(kTile) : "memory");
  #endif
}

// Tile C += tile A [16, 32] times tile B, whose rows hold pairs of A's columns side by side: [16, 16, 2].
template <int kC, int kA, int kB>
NABLA_FAST_INLINE void add_tile_product() {
  static_assert(kC != kA && kA != kB && kB != kC);
  #if NABLA_FAST_EMULATED
  emulated::add_product(kC, kA, kB);
  #else
  asm volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" : : "i"(kC), "i"(kA), "i"(kB));
  #endif
}

}  // namespace nabla_fast::gemm

#endif

#endif  // NABLA_FAST_CPU_GEMM_AMX_UNIT_H_
