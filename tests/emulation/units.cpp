#include "emulation/units.h"

#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <initializer_list>

namespace nabla_fast::emulated {
namespace {

constexpr int kTiles = 8, kMostRows = 16, kMostBytes = 64;
constexpr int kLanes = kMostBytes / 4;

// The instruction's format.
struct Shapes {
  uint8_t palette, start_row, reserved[14];
  uint16_t row_bytes[kTiles], no_row_bytes[8];
  uint8_t rows[kTiles], no_rows[8];
};
static_assert(sizeof(Shapes) == 64);

struct Unit {
  bool configured = false;
  Shapes shapes = {};
  alignas(64) char tiles[kTiles][kMostRows][kMostBytes] = {};
};

thread_local Unit unit;

[[noreturn]] void fail(const char* instruction, const char* what, int number) {
  std::fprintf(stderr, "emulated matrix unit: %s: %s (%d)\n", instruction, what, number);
  std::abort();
}

void check(bool good, const char* instruction, const char* what, int number) {
  if (!good) fail(instruction, what, number);
}

void check_usable(const char* instruction, int tile) {
  check(tile >= 0 && tile < kTiles, instruction, "there is no such tile", tile);
  check(unit.configured, instruction, "tile used while no configuration is loaded", tile);
  check(unit.shapes.rows[tile] > 0, instruction, "tile used that the configuration leaves out",
        tile);
}

// -- arithmetic -----------------------------------------------------------------------------------

// x where it is a normal number, zero of its sign where it lies below.
float normal(float x) { return std::fabs(x) < 0x1p-126f ? std::copysign(0.0f, x) : x; }

// The lower (0) or the upper bf16 (1) of a word.
float half(uint32_t word, int which) {
  const uint32_t bits = which ? word & 0xFFFF0000u : word << 16;
  float x;
  std::memcpy(&x, &bits, sizeof x);
  return normal(x);
}

// x rounded once to fp32, to nearest, ties to even; zero where the rounded number lies below 2^-126
// with an exponent of any size. Everything here rounds exactly: x is the sum of two fp32 numbers, or
// of one and a product of two bf16, to 53 bits, and such a sum, rounded again to 24, is what the
// exact sum would be rounded to, since 53 >= 2 * 24 + 2.
float rounded(double x) {
  return std::fabs(x) < 0x1.ffffffp-127 ? static_cast<float>(std::copysign(0.0, x))
                                        : static_cast<float>(x);
}

float multiply_add(float a, float b, float c) { return rounded(static_cast<double>(a) * b + c); }

float sum(float a, float b) { return rounded(static_cast<double>(a) + b); }

}  // namespace

void load_config(const void* from) {
  constexpr const char* kName = "loadconfig";
  Shapes shapes;
  std::memcpy(&shapes, from, sizeof shapes);
  // The CPU takes it. Here each kernel releases the unit, which would be saved with every change of
  // threads otherwise.
  check(!unit.configured, kName, "the last user has not released the unit", shapes.palette);
  check(shapes.palette == 1, kName, "the palette is not 1", shapes.palette);
  check(shapes.start_row == 0, kName, "the first row is not 0", shapes.start_row);
  for (const int byte : shapes.reserved) check(byte == 0, kName, "a reserved byte is set", byte);
  for (const int bytes : shapes.no_row_bytes)
    check(bytes == 0, kName, "a reserved byte is set", bytes);
  for (const int rows : shapes.no_rows) check(rows == 0, kName, "a reserved byte is set", rows);
  for (int tile = 0; tile < kTiles; ++tile) {
    const int rows = shapes.rows[tile], bytes = shapes.row_bytes[tile];
    check(rows <= kMostRows, kName, "a tile has more than 16 rows", rows);
    check(bytes <= kMostBytes, kName, "a row of a tile has more than 64 bytes", bytes);
    check((rows == 0) == (bytes == 0), kName, "a tile has rows of no bytes, or no rows", tile);
  }
  unit.configured = true;
  unit.shapes = shapes;
  std::memset(unit.tiles, 0, sizeof unit.tiles);
}

void release() { unit.configured = false; }

void load_tile(int tile, const void* from, int64_t stride) {
  check_usable("loadd", tile);
  std::memset(unit.tiles[tile], 0, sizeof unit.tiles[tile]);
  for (int row = 0; row < unit.shapes.rows[tile]; ++row)
    std::memcpy(unit.tiles[tile][row], static_cast<const char*>(from) + row * stride,
                unit.shapes.row_bytes[tile]);
}

void store_tile(int tile, void* to, int64_t stride) {
  check_usable("stored", tile);
  for (int row = 0; row < unit.shapes.rows[tile]; ++row)
    std::memcpy(static_cast<char*>(to) + row * stride, unit.tiles[tile][row],
                unit.shapes.row_bytes[tile]);
}

void add_product(int c, int a, int b) {
  constexpr const char* kName = "dpbf16ps";
  for (const int tile : {c, a, b}) check_usable(kName, tile);
  check(c != a && a != b && b != c, kName, "two of the three tiles are the same", c);
  const Shapes& shapes = unit.shapes;
  for (const int tile : {c, a, b})
    check(shapes.row_bytes[tile] % 4 == 0, kName, "a row ends within a word", tile);
  const int rows = shapes.rows[c], pairs = shapes.row_bytes[a] / 4;
  check(shapes.rows[a] == rows, kName, "the left factor has other rows than the sum", a);
  check(shapes.rows[b] == pairs, kName, "the right factor has other rows than the left has pairs",
        b);
  check(shapes.row_bytes[b] == shapes.row_bytes[c], kName,
        "the right factor has other columns than the sum", b);
  // Columns behind the last are zeros in b, and are not stored.
  float halves_of_b[2][kMostRows][kLanes];
  for (int k = 0; k < pairs; ++k) {
    uint32_t words[kLanes];
    std::memcpy(words, unit.tiles[b][k], sizeof words);
    for (int which = 0; which < 2; ++which)
      for (int n = 0; n < kLanes; ++n) halves_of_b[which][k][n] = half(words[n], which);
  }
  for (int m = 0; m < rows; ++m) {
    // Lower halves and upper ones are two chains of sums, both from 0.
    float chains[2][kLanes] = {}, total[kLanes];
    for (int k = 0; k < pairs; ++k) {
      uint32_t word;
      std::memcpy(&word, unit.tiles[a][m] + 4 * k, sizeof word);
      for (int which = 0; which < 2; ++which) {
        const float factor = half(word, which);
        for (int n = 0; n < kLanes; ++n)
          chains[which][n] = multiply_add(factor, halves_of_b[which][k][n], chains[which][n]);
      }
    }
    std::memcpy(total, unit.tiles[c][m], sizeof total);
    for (int n = 0; n < kLanes; ++n)
      total[n] = sum(normal(total[n]), sum(chains[0][n], chains[1][n]));
    std::memcpy(unit.tiles[c][m], total, shapes.row_bytes[c]);
  }
}

void add_dot_products(float* total, const uint32_t* a, const uint32_t* b) {
  for (int n = 0; n < kLanes; ++n) {
    // The upper halves come first.
    const float upper = multiply_add(half(a[n], 1), half(b[n], 1), normal(total[n]));
    total[n] = multiply_add(half(a[n], 0), half(b[n], 0), upper);
  }
}

}  // namespace nabla_fast::emulated
