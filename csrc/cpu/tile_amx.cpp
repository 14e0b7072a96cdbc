#include "tile_amx.h"

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>

#include "ahead.h"
#include "isa.h"

#if NABLA_FAST_X86 && defined(__linux__)
  #define NABLA_FAST_AMX 1
  #include <immintrin.h>
  #include <sys/syscall.h>
  #include <unistd.h>
#else
  #define NABLA_FAST_AMX 0
#endif

namespace nabla_fast::cpu {
namespace {

// Columns and tokens of a tile.
constexpr int kColumns = 32;
constexpr int kTokens = 16;

#if NABLA_FAST_AMX

  #define NABLA_FAST_TARGET_AMX \
    __attribute__((target(      \
        "amx-tile,amx-bf16,avx512f,avx512bw,avx512cd,avx512dq,avx512vl,avx2,fma,bmi,bmi2")))

// What the unit's registers hold: sums of up to 64 rows in four, tokens in one, rows in the others.
struct alignas(64) Shapes {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
  uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};

  explicit Shapes(int tokens) {
    for (int tile = 0; tile < 5; ++tile) rows[tile] = static_cast<uint8_t>(tokens);
  }
};

// Sums of `tokens` tokens, of which `w` is the first, with all lanes; kLanes: how many sixteens.
template <int kSixteens>
NABLA_FAST_TARGET_AMX inline void add_up(const PackedRows& rows, const uint16_t* w, int64_t stride,
                                         int tokens, bool add, float* z, Ahead& ahead) {
  const int lanes = rows.lanes(), terms = rows.terms;
  const int64_t width = rows.width, z_bytes = 4 * lanes, x_bytes = z_bytes * terms;
  const auto* x = static_cast<const char*>(rows.data);
  if (add) {
    _tile_loadd(0, z, z_bytes);
    if (kSixteens > 1) _tile_loadd(1, z + 16, z_bytes);
    if (kSixteens > 2) _tile_loadd(2, z + 32, z_bytes);
    if (kSixteens > 3) _tile_loadd(3, z + 48, z_bytes);
  } else {
    _tile_zero(0);
    if (kSixteens > 1) _tile_zero(1);
    if (kSixteens > 2) _tile_zero(2);
    if (kSixteens > 3) _tile_zero(3);
  }
  alignas(64) uint16_t last[kTokens][kColumns];
  for (int64_t k = 0; k < width; k += kColumns, x += 16 * x_bytes) {
    if (k + kColumns <= width) {
      ahead.walk<2 * kTokens * kColumns>();
      _tile_loadd(4, w + k, 2 * stride);
    } else {
      // What lies behind a row's last column is not the row's.
      std::memset(last, 0, sizeof last);
      for (int t = 0; t < tokens; ++t)
        std::memcpy(last[t], w + t * stride + k, static_cast<size_t>(2 * (width - k)));
      _tile_loadd(4, last, sizeof last[0]);
    }
    for (int term = 0; term < terms; ++term) {
      const char* part = x + term * z_bytes;
      _tile_loadd(5, part, x_bytes);
      _tile_dpbf16ps(0, 4, 5);
      if (kSixteens > 1) {
        _tile_loadd(6, part + 64, x_bytes);
        _tile_dpbf16ps(1, 4, 6);
      }
      if (kSixteens > 2) {
        _tile_loadd(7, part + 128, x_bytes);
        _tile_dpbf16ps(2, 4, 7);
      }
      if (kSixteens > 3) {
        _tile_loadd(5, part + 192, x_bytes);
        _tile_dpbf16ps(3, 4, 5);
      }
    }
  }
  _tile_stored(0, z, z_bytes);
  if (kSixteens > 1) _tile_stored(1, z + 16, z_bytes);
  if (kSixteens > 2) _tile_stored(2, z + 32, z_bytes);
  if (kSixteens > 3) _tile_stored(3, z + 48, z_bytes);
}

NABLA_FAST_TARGET_AMX void run(const PackedRows& rows, const Table& table, int tokens, bool add,
                               float* z) {
  const auto* w = static_cast<const uint16_t*>(table.data);
  const int lanes = rows.lanes();
  Ahead ahead{reinterpret_cast<const char*>(w + tokens * table.stride)};
  int shaped = 0;
  for (int t = 0; t < tokens; t += kTokens) {
    const int some = std::min(kTokens, tokens - t);
    if (some != shaped) {
      const Shapes shapes(some);
      _tile_loadconfig(&shapes);
      shaped = some;
    }
    const uint16_t* from = w + t * table.stride;
    float* to = z + t * lanes;
    switch (lanes / 16) {
      case 1:
        add_up<1>(rows, from, table.stride, some, add, to, ahead);
        break;
      case 2:
        add_up<2>(rows, from, table.stride, some, add, to, ahead);
        break;
      case 3:
        add_up<3>(rows, from, table.stride, some, add, to, ahead);
        break;
      default:
        add_up<4>(rows, from, table.stride, some, add, to, ahead);
    }
  }
  _tile_release();
}

bool ask_for_amx() {
  constexpr int kRequestPermission = 0x1023, kTileData = 18;  // of arch_prctl(2)
  __builtin_cpu_init();
  return __builtin_cpu_supports("amx-tile") && __builtin_cpu_supports("amx-bf16") &&
         syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
}

#else

void run(const PackedRows&, const Table&, int, bool, float*) {}
bool ask_for_amx() { return false; }

#endif

float widened(uint16_t bf16) {
  const uint32_t bits = static_cast<uint32_t>(bf16) << 16;
  float x;
  std::memcpy(&x, &bits, sizeof x);
  return x;
}

// The bf16 that x begins with; what it leaves over has the same sign, and eight bits less.
uint16_t begin_of(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  return static_cast<uint16_t>(bits >> 16);
}

// A product with an infinity, or of one, that terms have made NaN of: infinity times a term that is 0.
float product_of(const PackedRows& rows, int row, const uint16_t* w) {
  const auto* x = static_cast<const uint16_t*>(rows.data);
  float sum = 0;
  for (int64_t k = 0; k < rows.width; ++k) {
    float value = 0;
    for (int term = 0; term < rows.terms; ++term)
      value += widened(x[2 * ((k / 2 * rows.terms + term) * rows.lanes() + row) + k % 2]);
    sum += value * widened(w[k]);
  }
  return sum;
}

}  // namespace

bool has_amx() {
  static const bool has = ask_for_amx();
  return has;
}

void pack_amx(const Table& from, int rows, int lanes, int terms, void* packed) {
  auto* to = static_cast<uint16_t*>(packed);
  const int64_t padded_width = (from.width + kColumns - 1) / kColumns * kColumns;
  std::memset(packed, 0, static_cast<size_t>(2 * padded_width * terms * lanes));
  for (int r = 0; r < rows; ++r) {
    for (int64_t k = 0; k < from.width; ++k) {
      uint16_t* at = to + 2 * (k / 2 * terms * lanes + r) + k % 2;
      const int64_t index = r * from.stride + k;
      if (from.dtype == NABLA_FAST_BFLOAT16) {
        *at = static_cast<const uint16_t*>(from.data)[index];
        continue;
      }
      float rest = static_cast<const float*>(from.data)[index];
      for (int term = 0; term < terms; ++term, at += 2 * lanes) {
        *at = begin_of(rest);
        if (!std::isfinite(rest)) {
          // A NaN may have its bits at the end.
          if (std::isnan(rest)) *at = 0x7FC0;
          break;
        }
        rest -= widened(*at);
      }
    }
  }
}

void products_amx(const PackedRows& rows, const Table& table, int tokens, bool add, float* z) {
  if (rows.terms == 1) return run(rows, table, tokens, add, z);
  const int lanes = rows.lanes();
  alignas(64) float before[kTileTokens * kGroupRows];
  if (add) std::copy(z, z + tokens * lanes, before);
  run(rows, table, tokens, add, z);
  bool finite = true;
  for (int n = 0; n < tokens * lanes; ++n) finite &= z[n] - z[n] == 0;
  if (finite) return;
  for (int t = 0; t < tokens; ++t) {
    const uint16_t* w = static_cast<const uint16_t*>(table.data) + t * table.stride;
    for (int r = 0; r < rows.rows; ++r) {
      float& value = z[t * lanes + r];
      if (std::isfinite(value)) continue;
      value = product_of(rows, r, w);
      if (add) value += before[t * lanes + r];
    }
  }
}

}  // namespace nabla_fast::cpu
