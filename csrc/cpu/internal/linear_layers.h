// Linear layers of a decoder's pass, and their backward: float32 activations, and weights of the
// dtype in which they lie. A weight's elements are widened in registers or in a block that stays in
// a cache; a product is one of float32 on the weights' own numbers, and has the bits that it has
// with a float32 copy of them.
#ifndef NABLA_FAST_CPU_INTERNAL_LINEAR_LAYERS_H_
#define NABLA_FAST_CPU_INTERNAL_LINEAR_LAYERS_H_

#include <cstdint>

namespace nabla_fast::internal {

enum class WeightType : int32_t { kFloat32 = 0, kBfloat16 = 1, kFloat16 = 2 };

// A linear layer: weight [out, in], contiguous, and bias [out] or null.
struct Linear {
  const void* weight;
  const float* bias;
};

// Both widths of a layer, multiples of 16.
struct LinearShape {
  int64_t out, in;
};

// y[T, out] = x[T, in] weight^T + bias, of suffixes of `suffix` tokens. Short suffixes, a rollout's
// step say, have the bits of lm_logits.
void linear(const float* x, int64_t x_stride, int64_t tokens, int64_t suffix, const Linear& layer,
            WeightType type, LinearShape shape, float* y, int64_t y_stride, int32_t num_threads);

// dx[T, in] += dy[T, out] weight.
void linear_backward(const float* dy, int64_t dy_stride, int64_t tokens, const Linear& layer,
                     WeightType type, LinearShape shape, float* dx, int32_t num_threads);

}  // namespace nabla_fast::internal

#endif  // NABLA_FAST_CPU_INTERNAL_LINEAR_LAYERS_H_
