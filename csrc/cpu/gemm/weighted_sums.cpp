// add_weighted_sums(), for each instruction set.

#include "gemm/weighted_sums.h"

#include "base/isa.h"
#include "base/prefetch.h"
#include "gemm/amx.h"
#include "gemm/vocab_tiles.h"
#include "gemm/weighted_sums_pairs.h"

namespace nabla_fast::gemm {
namespace {

template <int W>
NABLA_FAST_INLINE void weighted_sums_kernel(const float* weights, int lanes, int rows,
                                            const Table& table, int tokens, float* sums) {
  const Prefetcher prefetcher{static_cast<const char*>(table.from(tokens).data)};
  // Sixteen rows read the tile several times, in all of which the next one arrives; fewer read it
  // once or twice.
  if (rows < 16)
    add_weighted_sums_vec<W, 1>(weights, lanes, rows, table, tokens, sums, prefetcher);
  else if (rows < 32)
    add_weighted_sums_vec<W, W == 16 ? 2 : 4>(weights, lanes, rows, table, tokens, sums,
                                              prefetcher);
  else
    add_weighted_sums_copied<W>(weights, lanes, rows, table, tokens, sums, prefetcher);
}

NABLA_FAST_FOR_EACH_ISA(weighted_sums, weighted_sums_kernel<W>)

}  // namespace

void add_weighted_sums(const float* weights, int lanes, int rows, const Table& table, int tokens,
                       float* sums, bool bf16_weights) {
  const Prefetcher prefetcher{static_cast<const char*>(table.from(tokens).data)};
  const nabla_fast_isa isa = nabla_fast_cpu_isa();
  if (table.dtype == NABLA_FAST_BFLOAT16 && isa >= NABLA_FAST_ISA_AMX)
    return add_weighted_sums_amx(weights, lanes, rows, table, tokens, sums, prefetcher,
                                 bf16_weights);
  if (bf16_weights && rounds_weights(table, isa))
    return add_weighted_sums_pairs(weights, lanes, rows, table, tokens, sums, prefetcher);
  weighted_sums.select(isa)(weights, lanes, rows, table, tokens, sums);
}

}  // namespace nabla_fast::gemm
