/* The functions of the CUDA runtime that examples/c/mix_on_device.c calls, for programs whose device is
 * the host of csrc/cuda/host: its memory is the program's own. */
#ifndef CUDA_RUNTIME_API_H_
#define CUDA_RUNTIME_API_H_

#include <stdlib.h>
#include <string.h>

#include "host/control.h"

typedef int cudaError_t;
typedef void* cudaStream_t;
enum { cudaSuccess = 0, cudaErrorMemoryAllocation = 2, cudaErrorUnknown = 999 };
enum { cudaMemcpyHostToDevice = 1, cudaMemcpyDeviceToHost = 2 };

static inline const char* cudaGetErrorString(cudaError_t error) {
  return error == cudaErrorMemoryAllocation ? "out of memory" : nabla_fast_host_reports();
}

static inline cudaError_t cudaMalloc(void** memory, size_t bytes) {
  *memory = malloc(bytes);
  if (!*memory) return cudaErrorMemoryAllocation;
  memset(*memory, 0xFF, bytes); /* NaN */
  nabla_fast_host_register(*memory, (int64_t)bytes, "cudaMalloc", 0);
  return cudaSuccess;
}

static inline cudaError_t cudaMemcpy(void* to, const void* from, size_t bytes, int direction) {
  (void)direction;
  memcpy(to, from, bytes);
  return cudaSuccess;
}

static inline cudaError_t cudaStreamCreate(cudaStream_t* stream) {
  *stream = NULL;
  return cudaSuccess;
}

static inline cudaError_t cudaStreamSynchronize(cudaStream_t stream) {
  (void)stream;
  return *nabla_fast_host_reports() ? cudaErrorUnknown : cudaSuccess;
}

#endif /* CUDA_RUNTIME_API_H_ */
