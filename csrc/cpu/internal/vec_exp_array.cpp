#include "internal/vec_exp_array.h"

#include "base/isa.h"
#include "simd/vec_exp.h"

namespace nabla_fast::internal {
namespace {

NABLA_FAST_INLINE void apply(const float* x, float* y, int64_t n) {
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) y[i] = vec_exp(x[i]);
}

void apply_baseline(const float* x, float* y, int64_t n) { apply(x, y, n); }
NABLA_FAST_TARGET_AVX2 void apply_avx2(const float* x, float* y, int64_t n) { apply(x, y, n); }
NABLA_FAST_TARGET_AVX512 void apply_avx512(const float* x, float* y, int64_t n) { apply(x, y, n); }

}  // namespace

void vec_exp_array(const float* x, float* y, int64_t n) {
  select_isa(apply_baseline, apply_avx2, apply_avx512)(x, y, n);
}

}  // namespace nabla_fast::internal
