// vec_exp over an array: what the tests measure its error with.
#ifndef NABLA_FAST_CPU_INTERNAL_VEC_EXP_ARRAY_H_
#define NABLA_FAST_CPU_INTERNAL_VEC_EXP_ARRAY_H_

#include <cstdint>

namespace nabla_fast::internal {

// y[i] = vec_exp(x[i]) for i < n
void vec_exp_array(const float* x, float* y, int64_t n);

}  // namespace nabla_fast::internal

#endif  // NABLA_FAST_CPU_INTERNAL_VEC_EXP_ARRAY_H_
