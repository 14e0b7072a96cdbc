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

// Sums of W vectors' lanes, in order, of which the first step is `kHalf`.
template <int W, int kHalf = W / 2>
NABLA_FAST_INLINE Floats<W> folded_sums(const Floats<W>* x) {
  if constexpr (kHalf == 0) {
    return x[0];
  } else {
    Floats<W> next[kHalf];
#pragma GCC unroll 8
    for (int n = 0; n < kHalf; ++n)
      next[n] = folded<W, kHalf>(x[2 * n], x[2 * n + 1], std::make_integer_sequence<int, W>{});
    return folded_sums<W, kHalf / 2>(next);
  }
}

// Sums of 16 vectors' lanes, in order, by vectors of W numbers: of each the halves are added, of
// these the halves, and so on.
template <int W>
NABLA_FAST_INLINE Lanes lane_sums(const Lanes (&x)[16]) {
  if constexpr (W == kLanes) {
    return folded_sums<W>(x);
  } else {
    const auto* lanes = reinterpret_cast<const float*>(x);
    float sums[kLanes];
#pragma GCC unroll 4
    for (int first = 0; first < kLanes; first += W) {
      Floats<W> part[W];
#pragma GCC unroll 8
      for (int n = 0; n < W; ++n) {
        const float* from = lanes + (first + n) * kLanes;
        part[n] = load<W>(from) + load<W>(from + 8);
        if constexpr (W == 4) part[n] += load<W>(from + 4) + load<W>(from + 12);
      }
      store<W>(sums + first, folded_sums<W>(part));
    }
    return load(sums);
  }
}

}  // namespace nabla_fast

#endif  // NABLA_FAST_CPU_SIMD_LANES_H_
