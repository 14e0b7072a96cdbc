// A grid of threads on the CPU: what device.h and launch.h are made of where there is no device.
//
// Each thread is a fiber. Blocks run one after another; the blocks of a cluster, or of a cooperative
// grid, run together. Which thread goes on after a barrier is drawn at random, from a seed.
#ifndef NABLA_FAST_CUDA_HOST_GRID_H_
#define NABLA_FAST_CUDA_HOST_GRID_H_

#include <cstddef>
#include <cstdint>

#include "host/report.h"
#include "host/shadow.h"

namespace nabla_fast::host {

// What a launch asks for.
struct Shape {
  const char* kernel;  // name in reports
  unsigned blocks, threads;
  unsigned cluster;  // blocks of a cluster
  bool cooperative;  // all blocks run together
  size_t shared;     // bytes of dynamic shared memory
};

// What launchers ask the device for.
enum class Limit { kMultiprocessors, kShared, kCluster };
int64_t limit_of(Limit limit);

// Runs body(arguments) in every thread. False if it was stopped by what reports() say.
bool run_grid(const Shape& shape, void (*body)(void*), void* arguments);

// -- within a thread ------------------------------------------------------------------------------

// Where the running thread is.
struct Position {
  unsigned block, blocks, thread, threads;
};
Position position();

// The functions below name the place that called them in their reports.

// Waits for all threads of a level.
void barrier(Level level);

// Shows a value to all lanes of the warp; returns that of lane `source`.
uint64_t exchange(unsigned source, uint64_t value);
// The lanes of `mask`, this one among them, whose value is true.
uint32_t ballot(uint32_t mask, bool value);

// A variable in the shared memory of this block, which `key` tells from others.
void* shared_variable(const void* key, size_t bytes, const char* name);
void* dynamic_shared();
// The same variable of another block of the cluster.
void* shared_of(const void* address, unsigned rank);

// Stops at an address that is no multiple of `bytes`.
void expect_aligned(const void* address, size_t bytes);

// -- copies that go on beside their thread --------------------------------------------------------
//
// Their source is read at once. What they bring is for threads that have waited for it.

// A barrier in shared memory, of one thread that expects bytes. It passes when they have come.
void init_copies(void* barrier);
void expect_copies(void* barrier, size_t bytes);
void bulk_copy(void* to, const void* from, size_t bytes, void* barrier);
// Waits until the barrier has passed an even number of times (parity 1), or an odd one.
void wait_for_copies(void* barrier, unsigned parity);

// 16 bytes, of a group that the thread waits for by itself: until at most `left` of its groups are
// under way.
void copy_16(void* to, const void* from);
void end_copy_group();
void wait_for_copy_groups(unsigned left);

// -- of accesses.cpp ------------------------------------------------------------------------------

// An access to memory; nothing outside of a grid. `aligned`: that it must be a multiple of `bytes`.
void access(const void* address, size_t bytes, bool writes, bool aligned, Place place);

}  // namespace nabla_fast::host

#endif  // NABLA_FAST_CUDA_HOST_GRID_H_
