// nabla_fast_cuda_why_no_device.

#include "device.h"
#include "nabla_fast_cuda.h"

#if defined(__CUDACC__)
namespace nabla_fast::cuda {
namespace {

__global__ void probe_kernel() {}

}  // namespace
}  // namespace nabla_fast::cuda
#endif

const char* nabla_fast_cuda_why_no_device(void) {
#if defined(__CUDACC__)
  cudaFuncAttributes attributes;
  const cudaError_t error = cudaFuncGetAttributes(
      &attributes, reinterpret_cast<const void*>(nabla_fast::cuda::probe_kernel));
  cudaGetLastError();
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
#else
  return nullptr;
#endif
}
