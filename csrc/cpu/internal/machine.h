// Highest rates of this machine: loops that only read, copy or multiply, for comparison with
// kernels. No part of the C interface.
#ifndef NABLA_FAST_CPU_INTERNAL_MACHINE_H_
#define NABLA_FAST_CPU_INTERNAL_MACHINE_H_

#include <cstdint>

namespace nabla_fast::internal {

// Each of them shares its work out among exactly `threads` OpenMP threads (one without OpenMP).

// The sum of x[0] to x[n - 1], in no fixed order: 4 n bytes are read.
double machine_read(const float* x, int64_t n, int threads);

// a[i] = b[i] + s c[i]: 8 n bytes are read and 4 n written, past the caches where the CPU can. All
// three are aligned to 64 bytes.
void machine_triad(float* a, const float* b, const float* c, float s, int64_t n, int threads);

// `rounds` rounds of multiply-adds on float32 in registers, in each thread. Returns the
// floating-point operations of all threads, a multiply-add being two.
double machine_multiply_adds(int64_t rounds, int threads);

// The same for products of pairs of bf16 summed in float32, four operations a lane; 0 where the
// level in force has no instruction for it.
double machine_dot_products(int64_t rounds, int threads);

// The same for products of tiles of bf16 summed in float32, on the CPU's matrix unit.
double machine_tile_products(int64_t rounds, int threads);

}  // namespace nabla_fast::internal

#endif  // NABLA_FAST_CPU_INTERNAL_MACHINE_H_
