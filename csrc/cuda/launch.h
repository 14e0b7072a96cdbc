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

// Blocks of a cluster that every device with clusters takes. More have to be asked for.
constexpr unsigned kPortableCluster = 8;

// A parameter from which no type is deduced.
template <typename T>
struct As {
  using type = T;
};

#if defined(__CUDACC__)
// A launch in the runtime's words. Whether the kernel may have what it asks for.
class Configuration {
 public:
  template <typename... Parameters>
  Configuration(const Launch& how, void (*kernel)(Parameters...)) {
    config.gridDim = static_cast<unsigned>(how.blocks);
    config.blockDim = how.threads;
    config.dynamicSmemBytes = how.shared;
    config.stream = static_cast<cudaStream_t>(how.stream);
    config.attrs = attributes_;
    if (how.cluster > 1) {
      cudaLaunchAttribute& cluster = attributes_[config.numAttrs++];
      cluster.id = cudaLaunchAttributeClusterDimension;
      cluster.val.clusterDim = {how.cluster, 1, 1};
    }
    if (how.cooperative) {
      cudaLaunchAttribute& cooperative = attributes_[config.numAttrs++];
      cooperative.id = cudaLaunchAttributeCooperative;
      cooperative.val.cooperative = 1;
    }
    const auto* const function = reinterpret_cast<const void*>(kernel);
    possible = (how.shared == 0 || allow_all_shared(function)) &&
               (how.cluster <= kPortableCluster ||
                cudaFuncSetAttribute(function, cudaFuncAttributeNonPortableClusterSizeAllowed, 1) ==
                    cudaSuccess);
  }

  cudaLaunchConfig_t config = {};
  bool possible;

 private:
  // As much as there is, whatever this launch takes: the attribute is one for all threads of a program.
  static bool allow_all_shared(const void* function) {
    cudaFuncAttributes of_function;
    int device, most;
    return cudaFuncGetAttributes(&of_function, function) == cudaSuccess &&
           cudaGetDevice(&device) == cudaSuccess &&
           cudaDeviceGetAttribute(&most, cudaDevAttrMaxSharedMemoryPerBlockOptin, device) ==
               cudaSuccess &&
           cudaFuncSetAttribute(function, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                most - static_cast<int>(of_function.sharedSizeBytes)) ==
               cudaSuccess;
  }

  cudaLaunchAttribute attributes_[2] = {};
};
#endif

// Whether the code of a kernel that this device runs was compiled with clusters, for 9.0 and later: code
// that a driver translates from older PTX was not, whatever the device has.
template <typename... Parameters>
bool knows_clusters(void (*kernel)(Parameters...)) {
#if defined(__CUDACC__)
  cudaFuncAttributes attributes;
  return cudaFuncGetAttributes(&attributes, reinterpret_cast<const void*>(kernel)) == cudaSuccess &&
         attributes.ptxVersion >= 90;
#else
  static_cast<void>(kernel);
  return true;
#endif
}

// Whether the device holds one of the launch's clusters at least.
template <typename... Parameters>
bool takes_clusters(const Launch& how, void (*kernel)(Parameters...)) {
#if defined(__CUDACC__)
  Configuration configuration(how, kernel);
  int clusters = 0;
  const bool asked = configuration.possible && cudaOccupancyMaxActiveClusters(
                                                   &clusters, reinterpret_cast<const void*>(kernel),
                                                   &configuration.config) == cudaSuccess;
  if (!asked) cudaGetLastError();
  return asked && clusters > 0;
#else
  static_cast<void>(kernel);
  return how.cluster <= host::limit_of(host::Limit::kCluster);
#endif
}

// Runs a kernel; true if it was started. A grid of no blocks has nothing to do.
template <typename... Parameters>
bool launch(const Launch& how, void (*kernel)(Parameters...),
            typename As<Parameters>::type... arguments) {
  if (how.blocks == 0) return true;
  if (how.blocks > kMostBlocks) return false;
#if defined(__CUDACC__)
  Configuration configuration(how, kernel);
  return configuration.possible &&
         cudaLaunchKernelEx(&configuration.config, kernel, arguments...) == cudaSuccess;
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
