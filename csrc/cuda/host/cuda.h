// Words of CUDA C++ for a compiler that does not know them: those that our kernels use.
#ifndef NABLA_FAST_CUDA_HOST_CUDA_H_
#define NABLA_FAST_CUDA_HOST_CUDA_H_

#include "host/grid.h"

// Never a part of its caller, whose accesses are not announced (launch.h).
#define __global__ __attribute__((noinline))
#define __device__
#define __forceinline__ inline __attribute__((always_inline))
#define __launch_bounds__(...)

namespace nabla_fast::host {

// Grids and blocks of ours have one dimension.
struct Dimension {
  unsigned x;
};

}  // namespace nabla_fast::host

#define threadIdx (::nabla_fast::host::Dimension{::nabla_fast::host::position().thread})
#define blockIdx (::nabla_fast::host::Dimension{::nabla_fast::host::position().block})
#define blockDim (::nabla_fast::host::Dimension{::nabla_fast::host::position().threads})
#define gridDim (::nabla_fast::host::Dimension{::nabla_fast::host::position().blocks})

#endif  // NABLA_FAST_CUDA_HOST_CUDA_H_
