// tanh for vectors of float32.
#ifndef NABLA_FAST_CPU_SIMD_VEC_TANH_H_
#define NABLA_FAST_CPU_SIMD_VEC_TANH_H_

#include "simd/vec.h"

namespace nabla_fast {

// tanh(x), within 3 ulp; NaN for NaN.
template <int W>
NABLA_FAST_INLINE Floats<W> vec_tanh(Floats<W> x) {
  const Floats<W> magnitude = x < 0.0f ? -x : x;
  // From 10 on it is 1 in float32.
  const Floats<W> bounded = magnitude > 10.0f ? splat<W>(10.0f) : magnitude;
  const Floats<W> e = vec_exp_normal<W>(-2.0f * bounded);
  const Floats<W> far = (1.0f - e) / (1.0f + e);
  // Near 0 the difference would cancel: the polynomial is that of Moshier's Cephes, tanhf.
  const Floats<W> z = bounded * bounded;
  Floats<W> p = splat<W>(-5.70498872745e-3f);
  p = p * z + 2.06390887954e-2f;
  p = p * z - 5.37397155531e-2f;
  p = p * z + 1.33314422036e-1f;
  p = p * z - 3.33332819422e-1f;
  const Floats<W> near = bounded + bounded * z * p;
  const Floats<W> y = bounded < 0.625f ? near : far;
  const Floats<W> with_sign = x < 0.0f ? -y : y;
  return x == x ? with_sign : x;
}

}  // namespace nabla_fast

#endif  // NABLA_FAST_CPU_SIMD_VEC_TANH_H_
