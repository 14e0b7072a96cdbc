// The gradient of a mix with respect to hidden states, whose logits are products with a head.
#ifndef NABLA_FAST_CUDA_LINEAR_EMBEDDING_MIX_BACKWARD_H_
#define NABLA_FAST_CUDA_LINEAR_EMBEDDING_MIX_BACKWARD_H_

#include "call.h"

namespace nabla_fast::cuda {

// Bytes of the workspace that a call with at least one row takes.
Size linear_backward_workspace(const nabla_fast_mix_args& call);

// Puts its launches into the stream; false if the device has refused one. The call has been checked.
bool linear_backward(const nabla_fast_mix_args& call, nabla_fast_cuda_stream stream);

}  // namespace nabla_fast::cuda

#endif  // NABLA_FAST_CUDA_LINEAR_EMBEDDING_MIX_BACKWARD_H_
