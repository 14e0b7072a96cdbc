// add_weighted_sums() of vocab_tiles.h where weights and table are bf16 and the CPU has a dot
// product for pairs of them.
#ifndef NABLA_FAST_CPU_GEMM_WEIGHTED_SUMS_PAIRS_H_
#define NABLA_FAST_CPU_GEMM_WEIGHTED_SUMS_PAIRS_H_

#include "base/prefetch.h"
#include "gemm/vocab_tiles.h"

namespace nabla_fast::gemm {

// lanes: a multiple of 16. Prefetches as many bytes as it reads.
void add_weighted_sums_pairs(const float* weights, int lanes, int rows, const Table& table,
                             int tokens, float* sums, Prefetcher prefetcher);

}  // namespace nabla_fast::gemm

#endif  // NABLA_FAST_CPU_GEMM_WEIGHTED_SUMS_PAIRS_H_
