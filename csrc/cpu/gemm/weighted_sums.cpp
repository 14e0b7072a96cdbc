// add_weighted_sums(), for each instruction set.

#include "gemm/weighted_sums.h"

#include "base/isa.h"
#include "base/prefetch.h"
#include "gemm/amx.h"
#include "gemm/vocab_tiles.h"

namespace nabla_fast::gemm {
namespace {

template <int W>
NABLA_FAST_INLINE void weighted_sums_kernel(const float* weights, int lanes, int rows,
                                            const Table& table, int tokens, float* sums) {
  const Prefetcher prefetcher{static_cast<const char*>(table.from(tokens).data)};
  // Few rows read the tile once or twice: the whole next tile has to arrive meanwhile.
  if (rows < 32)
    add_weighted_sums_vec<W, 1>(weights, lanes, rows, table, tokens, sums, prefetcher);
  else if (table.dtype == NABLA_FAST_BFLOAT16)
    add_weighted_sums_converted<W>(weights, lanes, rows, table, tokens, sums, prefetcher);
  else
    add_weighted_sums_vec<W, 4>(weights, lanes, rows, table, tokens, sums, prefetcher);
}

NABLA_FAST_FOR_EACH_ISA(weighted_sums, weighted_sums_kernel<W>)

}  // namespace

void add_weighted_sums(const float* weights, int lanes, int rows, const Table& table, int tokens,
                       float* sums, [[maybe_unused]] bool bf16_weights) {
  if (table.dtype == NABLA_FAST_BFLOAT16 && nabla_fast_cpu_isa() >= NABLA_FAST_ISA_AMX)
    return add_weighted_sums_amx(weights, lanes, rows, table, tokens, sums,
                                 Prefetcher{static_cast<const char*>(table.from(tokens).data)});
  weighted_sums(weights, lanes, rows, table, tokens, sums);
}

}  // namespace nabla_fast::gemm
