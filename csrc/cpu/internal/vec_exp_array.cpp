#include "internal/vec_exp_array.h"

#include "base/isa.h"
#include "simd/vec_exp.h"

namespace nabla_fast::internal {
namespace {

NABLA_FAST_INLINE void apply_kernel(const float* x, float* y, int64_t n) {
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) y[i] = vec_exp(x[i]);
}

NABLA_FAST_FOR_EACH_ISA(apply, apply_kernel)

}  // namespace

void vec_exp_array(const float* x, float* y, int64_t n) { apply(x, y, n); }

}  // namespace nabla_fast::internal
