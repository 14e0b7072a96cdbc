// Launches of kernels, with one body for the device and one for the host.
#ifndef NABLA_FAST_CUDA_LAUNCH_H_
#define NABLA_FAST_CUDA_LAUNCH_H_

#include <cstddef>
#include <cstdint>

#include "device.h"

namespace nabla_fast::cuda {

struct Launch {
  const char* kernel;  // its name, for reports
  void* stream;        // a cudaStream_t
  int64_t blocks;
  unsigned threads;
  size_t shared = 0;  // bytes of dynamic shared memory
  unsigned cluster = 1;
  bool cooperative = false;
};

constexpr int64_t kMostBlocks = 0x7FFFFFFF;

// A parameter from which no type is deduced.
template <typename T>
struct As {
  using type = T;
};

// Runs a kernel; true if it was started. A grid of no blocks has nothing to do.
template <typename... Parameters>
bool launch(const Launch& how, void (*kernel)(Parameters...),
            typename As<Parameters>::type... arguments) {
  if (how.blocks == 0) return true;
  if (how.blocks > kMostBlocks) return false;
#if defined(__CUDACC__)
  cudaLaunchAttribute attributes[2] = {};
  cudaLaunchConfig_t config = {};
  config.gridDim = static_cast<unsigned>(how.blocks);
  config.blockDim = how.threads;
  config.dynamicSmemBytes = how.shared;
  config.stream = static_cast<cudaStream_t>(how.stream);
  config.attrs = attributes;
  if (how.cluster > 1) {
    cudaLaunchAttribute& cluster = attributes[config.numAttrs++];
    cluster.id = cudaLaunchAttributeClusterDimension;
    cluster.val.clusterDim = {how.cluster, 1, 1};
  }
  if (how.cooperative) {
    cudaLaunchAttribute& cooperative = attributes[config.numAttrs++];
    cooperative.id = cudaLaunchAttributeCooperative;
    cooperative.val.cooperative = 1;
  }
  if (how.shared > 0 && cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel),
                                             cudaFuncAttributeMaxDynamicSharedMemorySize,
                                             static_cast<int>(how.shared)) != cudaSuccess)
    return false;
  return cudaLaunchKernelEx(&config, kernel, arguments...) == cudaSuccess;
#else
  // The arguments are the launch's own memory, not device code's: their reading is not announced.
  auto call = [&]() __attribute__((no_sanitize_thread)) { kernel(arguments...); };
  const auto run = [](void* given) __attribute__((no_sanitize_thread)) {
    (*static_cast<decltype(call)*>(given))();
  };
  return host::run_grid({how.kernel, static_cast<unsigned>(how.blocks), how.threads, how.cluster,
                         how.cooperative, how.shared},
                        run, &call);
#endif
}

}  // namespace nabla_fast::cuda

#endif  // NABLA_FAST_CUDA_LAUNCH_H_
