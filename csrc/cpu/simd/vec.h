// Vectors of W floats, for loops that the compiler would not vectorize by itself: W is 16 with
// AVX-512, 8 with AVX2 and 4 elsewhere. Operators work lane by lane; a comparison gives a mask that
// selects with ?:.
#ifndef NABLA_FAST_CPU_SIMD_VEC_H_
#define NABLA_FAST_CPU_SIMD_VEC_H_

#include <cstdint>
#include <cstring>
#include <type_traits>
#include <utility>

#include "base/floats.h"
#include "base/isa.h"
#include "simd/avx512.h"

namespace nabla_fast {

template <int W>
struct VecTypes {
  typedef float Floats __attribute__((vector_size(4 * W)));
  typedef int32_t Ints __attribute__((vector_size(4 * W)));
  typedef uint32_t Bits __attribute__((vector_size(4 * W)));
  // Floats anywhere in an array.
  typedef float Stored __attribute__((vector_size(4 * W), aligned(4), may_alias));
};

template <int W>
using Floats = typename VecTypes<W>::Floats;
template <int W>
using Ints = typename VecTypes<W>::Ints;

template <int W>
NABLA_FAST_INLINE Floats<W> splat(float x) {
  return Floats<W>{} + x;
}

template <int W>
NABLA_FAST_INLINE Floats<W> load(const float* x) {
  return *reinterpret_cast<const typename VecTypes<W>::Stored*>(x);
}

template <int W>
NABLA_FAST_INLINE void store(float* y, Floats<W> x) {
  *reinterpret_cast<typename VecTypes<W>::Stored*>(y) = x;
}

// `x` in every lane, and in a register: for elements that several operations share. Left to itself,
// the compiler reads the element anew for every operation, or adds it to 0.
template <int W>
NABLA_FAST_INLINE Floats<W> broadcast(const float& x) {
#if NABLA_FAST_AVX2
  Floats<W> lanes;
  if constexpr (W == 16 && NABLA_FAST_AVX512) {
    asm("vbroadcastss %1, %0" : "=v"(lanes) : "m"(x));
    return lanes;
  }
  if constexpr (W == 8) {
    asm("vbroadcastss %1, %0" : "=x"(lanes) : "m"(x));
    return lanes;
  }
#endif
  // As bits: a float added to 0 would lose its sign where it is -0, and itself below 2^-126 where
  // results there are flushed.
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  return (Floats<W>)(typename VecTypes<W>::Bits{} + bits);
}

// Keeps the compiler from computing x anew where it is used, if vectors of W floats have registers.
template <int W, typename Vector>
NABLA_FAST_INLINE void keep_in_register([[maybe_unused]] Vector& x) {
#if NABLA_FAST_AVX512
  if constexpr (W == 16) asm("" : "+v"(x));
#endif
}

template <int W>
NABLA_FAST_INLINE Floats<W> vec_sqrt(Floats<W> x) {
  Floats<W> y = {};
#pragma GCC unroll 16
  for (int lane = 0; lane < W; ++lane) y[lane] = __builtin_sqrtf(x[lane]);
  return y;
}

// exp(x) 2^kPower where that is in [exp(-87), exp(88)], within 2 ulp; anything elsewhere. The steps
// of vec_exp_normal.
template <int W, int kPower = 0>
NABLA_FAST_INLINE Floats<W> vec_exp_normal(Floats<W> x) {
  const float round = 12582912.0f;
  const Floats<W> shifted = x * 1.44269504f + round;
  const Floats<W> n = shifted - round;
  const Floats<W> r = (x - n * 0.693359375f) - n * -2.12194440e-4f;
  Floats<W> q = 1.38145383e-3f * r + 8.36874545e-3f;
  q = q * r + 4.16683890e-2f;
  q = q * r + 1.66665211e-1f;
  q = q * r + 4.99999940e-1f;
  const Floats<W> mantissa = 1.0f + (r + (r * r) * q);
  // The low bits of `shifted` hold n; the bits above them are shifted out.
  using Bits = typename VecTypes<W>::Bits;
  return (Floats<W>)((Bits)mantissa + (((Bits)shifted + uint32_t{kPower}) << 23));
}

// exp(x) for x <= 0, and 0 below kMinExponent.
template <int W>
NABLA_FAST_INLINE Floats<W> vec_exp_or_zero(Floats<W> x) {
  return x > kMinExponent ? vec_exp_normal<W>(x) : Floats<W>{};
}

// Lanes that a condition holds for.
template <int W>
using Mask = std::conditional_t<NABLA_FAST_AVX512_BUILTINS && W == 16, uint16_t, Ints<W>>;

// x > bound, or x is NaN.
template <int W>
NABLA_FAST_INLINE Mask<W> above(Floats<W> x, float bound) {
#if NABLA_FAST_AVX512_BUILTINS
  if constexpr (W == 16) return avx512::above(x, splat<W>(bound));
#endif
  if constexpr (!NABLA_FAST_AVX512_BUILTINS || W != 16) return ~(x <= bound);
}

template <int W>
NABLA_FAST_INLINE Mask<W> at_least(Floats<W> x, float bound) {
#if NABLA_FAST_AVX512_BUILTINS
  if constexpr (W == 16) return avx512::at_least(x, splat<W>(bound));
#endif
  if constexpr (!NABLA_FAST_AVX512_BUILTINS || W != 16) return x >= bound;
}

template <int W>
NABLA_FAST_INLINE Floats<W> select(Mask<W> mask, Floats<W> yes, Floats<W> no) {
#if NABLA_FAST_AVX512_BUILTINS
  if constexpr (W == 16) return avx512::select(mask, yes, no);
#endif
  if constexpr (!NABLA_FAST_AVX512_BUILTINS || W != 16) return mask ? yes : no;
}

// exp2(x * (high + low)) where the mask holds and the product is in [-126, 127], within 2 ulp;
// 0 where it does not.
template <int W>
NABLA_FAST_INLINE Floats<W> vec_exp2(Mask<W> mask, Floats<W> x, float high, float low) {
  const float round = 12582912.0f;
  const Floats<W> shifted = x * high + round;
  const Floats<W> n = shifted - round;
  const Floats<W> f = x * low + (x * high - n);
  // Minimax for (exp2(f) - 1) / f on |f| <= 1/2: 2^-27.9 relative to exp2(f).
  Floats<W> q = 1.51966931e-4f * f + 1.33913045e-3f;
  q = q * f + 9.61900223e-3f;
  q = q * f + 5.55035882e-2f;
  q = q * f + 2.40226433e-1f;
  q = q * f + 6.93147182e-1f;
  const Floats<W> mantissa = q * f + 1.0f;
#if NABLA_FAST_AVX512_BUILTINS
  if constexpr (W == 16) return avx512::scaled(mask, mantissa, n);
#endif
  if constexpr (!NABLA_FAST_AVX512_BUILTINS || W != 16) {
    using Bits = typename VecTypes<W>::Bits;
    // A factor, not a term: a NaN remains one.
    const Bits one = Bits{} + 0x3F800000u;
    return select<W>(mask, mantissa * (Floats<W>)(one + ((Bits)shifted << 23)), Floats<W>{});
  }
}

// True if vec_rsqrt14 and vec_rcp14 exist: 1 / sqrt(x) and 1 / x within 2^-14, relatively, for
// normal numbers.
template <int W>
constexpr bool kHasEstimates = NABLA_FAST_AVX512_BUILTINS && W == 16;

#if NABLA_FAST_AVX512_BUILTINS
NABLA_FAST_INLINE Floats<16> vec_rsqrt14(Floats<16> x) { return avx512::rsqrt14(x); }
NABLA_FAST_INLINE Floats<16> vec_rcp14(Floats<16> x) { return avx512::rcp14(x); }
#else
Floats<16> vec_rsqrt14(Floats<16> x);
Floats<16> vec_rcp14(Floats<16> x);
#endif

template <int W>
NABLA_FAST_INLINE void split(Floats<W> x, Floats<W / 2>& low, Floats<W / 2>& high) {
  __builtin_memcpy(&low, &x, sizeof low);
  __builtin_memcpy(&high, reinterpret_cast<const char*>(&x) + sizeof low, sizeof high);
}

// Halves are combined with each other: lane by lane, every operation would wait for the one before.
template <int W>
NABLA_FAST_INLINE float lane_max(Floats<W> x) {
  if constexpr (W == 1) {
    return x[0];
  } else {
    Floats<W / 2> low, high;
    split<W>(x, low, high);
    return lane_max<W / 2>(low > high ? low : high);
  }
}

template <int W>
NABLA_FAST_INLINE float lane_sum(Floats<W> x) {
  if constexpr (W == 1) {
    return x[0];
  } else {
    Floats<W / 2> low, high;
    split<W>(x, low, high);
    return lane_sum<W / 2>(low + high);
  }
}

#if NABLA_FAST_AVX512_BUILTINS
template <int W>
NABLA_FAST_INLINE bool any_lane(uint16_t mask) {
  return mask != 0;
}
#endif

template <int W>
NABLA_FAST_INLINE bool any_lane(Ints<W> mask) {
  int32_t any = 0;
  for (int lane = 0; lane < W; ++lane) any |= mask[lane];
  return any != 0;
}

// Vector with the segments of a, then those of b, both halved: the two halves of every segment of
// 2 * kHalf lanes are added.
template <int W, int kHalf, int... kLane>
NABLA_FAST_INLINE Floats<W> folded(Floats<W> a, Floats<W> b, std::integer_sequence<int, kLane...>) {
  constexpr int kSegments = W / (2 * kHalf);
  return __builtin_shufflevector(a, b,
                                 ((kLane / kHalf < kSegments ? 0 : W) +
                                  kLane / kHalf % kSegments * 2 * kHalf + kLane % kHalf)...) +
         __builtin_shufflevector(
             a, b,
             ((kLane / kHalf < kSegments ? 0 : W) + kLane / kHalf % kSegments * 2 * kHalf + kHalf +
              kLane % kHalf)...);
}

// Two rows of blocks of kHalf lanes, whose two blocks beside the diagonal change places.
template <int W, int kHalf, typename Vector, int... kLane>
NABLA_FAST_INLINE void swap_blocks(Vector& a, Vector& b, std::integer_sequence<int, kLane...>) {
  const Vector upper =
      __builtin_shufflevector(a, b, (kLane & kHalf ? W + kLane - kHalf : kLane)...);
  const Vector lower =
      __builtin_shufflevector(a, b, (kLane & kHalf ? W + kLane : kLane + kHalf)...);
  a = upper;
  b = lower;
}

// Transpose of W x W numbers.
template <int W, typename Vector, int kHalf = 1>
NABLA_FAST_INLINE void transpose(Vector (&x)[W]) {
  if constexpr (kHalf < W) {
#pragma GCC unroll 16
    for (int i = 0; i < W; ++i)
      if (!(i & kHalf))
        swap_blocks<W, kHalf>(x[i], x[i + kHalf], std::make_integer_sequence<int, W>{});
    transpose<W, Vector, 2 * kHalf>(x);
  }
}

}  // namespace nabla_fast

#endif  // NABLA_FAST_CPU_SIMD_VEC_H_
