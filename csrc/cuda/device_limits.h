// Limits of the device that launches go to.
#ifndef NABLA_FAST_CUDA_DEVICE_LIMITS_H_
#define NABLA_FAST_CUDA_DEVICE_LIMITS_H_

#include <cstdint>

#include "device.h"

namespace nabla_fast::cuda {

struct Limits {
  int64_t multiprocessors;
  int64_t shared_bytes;  // of a block
  int64_t most_cluster;  // blocks of a cluster that every such device takes; 1: it has none
};

// The number of the current device; false where there is none.
inline bool read_device(int& device) {
#if defined(__CUDACC__)
  return cudaGetDevice(&device) == cudaSuccess;
#else
  device = 0;
  return true;
#endif
}

// Of the current device; false where there is none.
inline bool read_limits(Limits& limits) {
#if defined(__CUDACC__)
  int device, multiprocessors, shared_bytes, major;
  if (!read_device(device) ||
      cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, device) !=
          cudaSuccess ||
      cudaDeviceGetAttribute(&shared_bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, device) !=
          cudaSuccess ||
      cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device) != cudaSuccess)
    return false;
  // Compute capability 9.0 and 10.0 take 16 where a kernel asks for it.
  limits = {multiprocessors, shared_bytes, major < 9 ? 1 : major < 12 ? 16 : 8};
  return true;
#else
  limits = {host::limit_of(host::Limit::kMultiprocessors), host::limit_of(host::Limit::kShared),
            host::limit_of(host::Limit::kCluster)};
  return true;
#endif
}

}  // namespace nabla_fast::cuda

#endif  // NABLA_FAST_CUDA_DEVICE_LIMITS_H_
