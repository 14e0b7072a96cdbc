// Bits of the emulated units beside those of the CPU's own, on random inputs.
//
//   compare [SEED [ROUNDS]]
//
// Exit status 77 where the CPU lacks a unit.

#if !defined(__x86_64__) || !defined(__linux__)

int main() { return 77; }

#else

  #include <immintrin.h>
  #include <sys/syscall.h>
  #include <unistd.h>

  #include <cinttypes>
  #include <cmath>
  #include <cstdint>
  #include <cstdio>
  #include <cstdlib>
  #include <cstring>
  #include <random>

  #include "emulation/units.h"

namespace emulated = nabla_fast::emulated;

namespace {

constexpr int kSide = 16, kWords = kSide * kSide;

struct alignas(64) Shapes {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t row_bytes[16] = {};
  uint8_t rows[16] = {};
};

bool has_units() {
  constexpr int kRequestPermission = 0x1023, kTileData = 18;  // of arch_prctl(2)
  __builtin_cpu_init();
  return __builtin_cpu_supports("avx512bf16") && __builtin_cpu_supports("amx-bf16") &&
         syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
}

// -- the CPU's own --------------------------------------------------------------------------------

__attribute__((target("amx-tile,amx-bf16"))) void product_of_cpu(const Shapes& shapes, float* c,
                                                                 const uint32_t* a,
                                                                 const uint32_t* b) {
  asm volatile("ldtilecfg %0" : : "m"(shapes));
  asm volatile("tileloadd (%0,%1,1), %%tmm0" : : "r"(c), "r"(64l) : "memory");
  asm volatile("tileloadd (%0,%1,1), %%tmm1" : : "r"(a), "r"(64l) : "memory");
  asm volatile("tileloadd (%0,%1,1), %%tmm2" : : "r"(b), "r"(64l) : "memory");
  asm volatile("tdpbf16ps %tmm2, %tmm1, %tmm0");
  asm volatile("tilestored %%tmm0, (%0,%1,1)" : : "r"(c), "r"(64l) : "memory");
  asm volatile("tilerelease");
}

__attribute__((target("avx512f,avx512bf16"))) void dot_products_of_cpu(float* total,
                                                                       const uint32_t* a,
                                                                       const uint32_t* b) {
  __m512 sums = _mm512_loadu_ps(total);
  const __m512i x = _mm512_loadu_si512(a), y = _mm512_loadu_si512(b);
  asm("vdpbf16ps %2, %1, %0" : "+v"(sums) : "v"(x), "v"(y));
  _mm512_storeu_ps(total, sums);
}

// -- numbers --------------------------------------------------------------------------------------

std::mt19937_64 generator;

uint32_t below(uint32_t n) { return static_cast<uint32_t>(generator() % n); }

uint32_t bits_of(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  return bits;
}

// Kinds of matrices: what exponents their numbers have.
enum Kind { kAnyBits, kModerate, kCancelling, kSmallest, kBoundary, kLargest, kSpecial, kKinds };

// An fp32 number; its upper half is one of bf16.
uint32_t number(Kind kind) {
  const uint32_t sign = below(2) << 31, fraction = below(1u << 23);
  switch (kind) {
    case kAnyBits:
      return static_cast<uint32_t>(generator());
    case kModerate:
      return sign | (110 + below(35)) << 23 | fraction;
    case kCancelling:  // few numbers, so that sums meet their negatives
      return sign | (120 + 4 * below(3)) << 23 | (fraction & 0x600000);
    case kSmallest:  // products around 2^-126, subnormal factors too
      return sign | (below(8) ? 50 + below(30) : below(2)) << 23 | fraction;
    case kBoundary:  // products of 2^-126 and of 2^-150 to 2^-152, whose sums are just below 2^-126
      return sign | (below(2) ? 127 - 63 : 127 - 75 - below(2)) << 23 | (below(4) ? 0 : fraction);
    case kLargest:  // products around 2^128
      return sign | (180 + below(20)) << 23 | fraction;
    default: {
      const uint32_t special[] = {0,          0x80000000, 0x7F800000, 0xFF800000, 0x7FC00000,
                                  0x00800000, 0x007FFFFF, 0x00010000, 0x7F7FFFFF, 0x3F800000,
                                  0xBF800000, 0x7F800001, 0x80800000, 0x807F0000};
      return below(4) ? sign | 0x3F000000 | fraction : special[below(14)];
    }
  }
}

// A sum to begin with; one that lies near the products for the kinds at an end of the range.
uint32_t begin(Kind kind) {
  if (below(3) == 0) return 0;
  if (kind == kSmallest)
    return below(2) << 31 | below(4) << 23 | (below(3) ? below(1u << 23) : 0x7FFFFF);
  if (kind == kBoundary) return below(2) << 31 | 1u << 23;
  if (kind == kLargest) return below(2) << 31 | (250 + below(5)) << 23 | below(1u << 23);
  return number(kind);
}

uint32_t pair(Kind kind) { return (number(kind) & 0xFFFF0000u) | number(kind) >> 16; }

int64_t numbers = 0, counts[5] = {};  // compared; of them NaN, infinite, zero, below 2^-125

bool same(const char* unit, Kind kind, int n, const float* ours, const float* theirs) {
  for (int i = 0; i < n; ++i) {
    ++numbers;
    counts[0] += std::isnan(theirs[i]);
    counts[1] += std::isinf(theirs[i]);
    counts[2] += theirs[i] == 0;
    counts[3] += theirs[i] != 0 && std::fabs(theirs[i]) < 0x1p-125f;
    if (std::isnan(ours[i]) && std::isnan(theirs[i])) continue;
    if (bits_of(ours[i]) == bits_of(theirs[i])) continue;
    std::printf("%s: inputs of kind %d, element %d: %a (%08" PRIx32 "), the CPU has %a (%08" PRIx32
                ")\n",
                unit, kind, i, static_cast<double>(ours[i]), bits_of(ours[i]),
                static_cast<double>(theirs[i]), bits_of(theirs[i]));
    return false;
  }
  return true;
}

bool compare_products(Kind kind) {
  Shapes shapes;
  const bool whole = below(2);
  const int rows = whole ? kSide : 1 + static_cast<int>(below(kSide));
  const int pairs = whole ? kSide : 1 + static_cast<int>(below(kSide));
  const int columns = whole ? kSide : 1 + static_cast<int>(below(kSide));
  const int shape[3][2] = {{rows, columns}, {rows, pairs}, {pairs, columns}};
  for (int tile = 0; tile < 3; ++tile) {
    shapes.rows[tile] = static_cast<uint8_t>(shape[tile][0]);
    shapes.row_bytes[tile] = static_cast<uint16_t>(4 * shape[tile][1]);
  }
  float c[kWords], theirs[kWords];
  uint32_t a[kWords], b[kWords], words[kWords];
  for (int n = 0; n < kWords; ++n) {
    words[n] = begin(kind);
    a[n] = pair(kind);
    b[n] = pair(kind);
  }
  std::memcpy(c, words, sizeof c);
  std::memcpy(theirs, words, sizeof c);
  product_of_cpu(shapes, theirs, a, b);
  emulated::load_config(&shapes);
  emulated::load_tile(0, c, 64);
  emulated::load_tile(1, a, 64);
  emulated::load_tile(2, b, 64);
  emulated::add_product(0, 1, 2);
  emulated::store_tile(0, c, 64);
  emulated::release();
  return same("dpbf16ps of tiles", kind, kWords, c, theirs);
}

bool compare_dot_products(Kind kind) {
  float total[kSide], theirs[kSide];
  uint32_t a[kSide], b[kSide], words[kSide];
  for (int n = 0; n < kSide; ++n) {
    words[n] = begin(kind);
    a[n] = pair(kind);
    b[n] = pair(kind);
  }
  std::memcpy(total, words, sizeof total);
  std::memcpy(theirs, words, sizeof total);
  dot_products_of_cpu(theirs, a, b);
  emulated::add_dot_products(total, a, b);
  return same("vdpbf16ps", kind, kSide, total, theirs);
}

}  // namespace

int main(int count, char** arguments) {
  generator.seed(count > 1 ? std::strtoull(arguments[1], nullptr, 10) : 1);
  const int rounds = count > 2 ? std::atoi(arguments[2]) : 300;
  if (!has_units()) {
    std::printf("this CPU has no matrix unit\n");
    return 77;
  }
  for (int round = 0; round < rounds; ++round) {
    for (int kind = 0; kind < kKinds; ++kind) {
      if (!compare_products(static_cast<Kind>(kind))) return 1;
      for (int n = 0; n < 4; ++n)
        if (!compare_dot_products(static_cast<Kind>(kind))) return 1;
    }
  }
  std::printf("%" PRId64 " numbers alike: %" PRId64 " NaN, %" PRId64 " infinite, %" PRId64
              " zero, %" PRId64 " below 2^-125\n",
              numbers, counts[0], counts[1], counts[2], counts[3]);
  return 0;
}

#endif
