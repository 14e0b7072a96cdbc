/* What a test says to the host that runs device code, and what it is told. For one thread of the
 * system at a time. */
#ifndef NABLA_FAST_CUDA_HOST_CONTROL_H_
#define NABLA_FAST_CUDA_HOST_CONTROL_H_

#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

#define NABLA_FAST_HOST_API __attribute__((visibility("default")))

/* The order of threads is drawn from `seed`; `target` is the device whose shared memory is the
 * limit: 80, 90, 100 or 120. Returns 0 if there is no such target, else 1. */
NABLA_FAST_HOST_API int32_t nabla_fast_host_configure(uint64_t seed, int32_t target);

/* What launchers are told of the device: multiprocessors, bytes of shared memory of a block, and blocks
 * of a cluster, 1 for none. 0: 8 of the first, and what the target has. */
NABLA_FAST_HOST_API void nabla_fast_host_limit(int32_t multiprocessors, int64_t shared_bytes,
                                               int32_t most_cluster);

/* Device code may read this memory from now on, and write it unless `constant`. Its name stands in
 * reports. */
NABLA_FAST_HOST_API void nabla_fast_host_register(const void* memory, int64_t bytes,
                                                  const char* name, int32_t constant);
/* Device code may touch no memory any more. */
NABLA_FAST_HOST_API void nabla_fast_host_forget(void);

/* What device code has done wrong, a line each; "" for nothing. Valid until the next launch. */
NABLA_FAST_HOST_API const char* nabla_fast_host_reports(void);
NABLA_FAST_HOST_API void nabla_fast_host_clear_reports(void);

/* Begins a list of launches, or ends it where `listed` is 0. */
NABLA_FAST_HOST_API void nabla_fast_host_list_launches(int32_t listed);
/* A line for each: the kernel and its blocks. Valid until the next launch. */
NABLA_FAST_HOST_API const char* nabla_fast_host_launches(void);

#ifdef __cplusplus
}
#endif

#endif /* NABLA_FAST_CUDA_HOST_CONTROL_H_ */
