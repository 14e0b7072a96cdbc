// Sixteen floats as one value at every instruction set, so that sums over them have one order.
#ifndef NABLA_FAST_CPU_SIMD_LANES_H_
#define NABLA_FAST_CPU_SIMD_LANES_H_

#include <cstdint>
#include <cstring>
#include <utility>

#include "base/isa.h"
#include "simd/bf16.h"
#include "simd/vec.h"

namespace nabla_fast {

constexpr int kLanes = 16;

using Lanes = Floats<kLanes>;

// `n` numbers rounded up to whole vectors, as rows have room for them.
constexpr int64_t padded(int64_t n) { return (n + kLanes - 1) / kLanes * kLanes; }

NABLA_FAST_INLINE Lanes load(const float* x) { return load<kLanes>(x); }
// load_fp32() is for the width of an instruction set.
NABLA_FAST_INLINE Lanes load(const uint16_t* bf16) {
  typedef uint16_t Halves __attribute__((vector_size(2 * kLanes)));
  Halves halves;
  std::memcpy(&halves, bf16, sizeof halves);
  return lower_to_fp32<kLanes>(__builtin_convertvector(halves, VecTypes<kLanes>::Bits));
}

// The first `count` elements, and zeros.
template <typename T>
NABLA_FAST_INLINE Lanes load_part(const T* x, int count) {
  T padded[kLanes] = {};
  std::memcpy(padded, x, sizeof(T) * static_cast<size_t>(count));
  return load(padded);
}

NABLA_FAST_INLINE void store(float* x, Lanes lanes) { store<kLanes>(x, lanes); }

// Sums of 16 vectors' lanes, in order.
NABLA_FAST_INLINE Lanes lane_sums(const Lanes (&x)[16]) {
  constexpr auto kIndices = std::make_integer_sequence<int, kLanes>{};
  Lanes a[8], b[4];
#pragma GCC unroll 8
  for (int n = 0; n < 8; ++n) a[n] = folded<kLanes, 8>(x[2 * n], x[2 * n + 1], kIndices);
#pragma GCC unroll 4
  for (int n = 0; n < 4; ++n) b[n] = folded<kLanes, 4>(a[2 * n], a[2 * n + 1], kIndices);
  return folded<kLanes, 1>(folded<kLanes, 2>(b[0], b[1], kIndices),
                           folded<kLanes, 2>(b[2], b[3], kIndices), kIndices);
}

}  // namespace nabla_fast

#endif  // NABLA_FAST_CPU_SIMD_LANES_H_
