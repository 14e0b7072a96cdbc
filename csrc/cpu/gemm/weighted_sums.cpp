// add_weighted_sums(), for each instruction set.

#include "gemm/weighted_sums.h"

#include <algorithm>

#include "base/isa.h"
#include "base/prefetch.h"
#include "gemm/amx.h"
#include "gemm/vocab_tiles.h"
#include "gemm/weighted_sums_copied.h"
#include "gemm/weighted_sums_pairs.h"

namespace nabla_fast::gemm {
namespace {

template <int W, typename T>
NABLA_FAST_INLINE void weighted_sums_kernel(const float* weights, int lanes, int rows,
                                            const Table& table, int tokens, float* sums,
                                            Prefetcher prefetcher) {
  const int64_t width = padded(table.width);
  // Sixteen rows read the tile several times, in all of which the next one arrives; fewer read it
  // once or twice.
  if (rows < 16)
    add_all_rows<W, kRowsAtOnce<W>, 1, T>(weights, lanes, rows, table, tokens, sums, width,
                                          prefetcher);
  else if (rows < 32)
    add_all_rows<W, kRowsAtOnce<W>, W == 16 ? 2 : 4, T>(weights, lanes, rows, table, tokens, sums,
                                                        width, prefetcher);
  else
    add_weighted_sums_copied<W, T>(weights, lanes, rows, table, tokens, sums, prefetcher);
}

NABLA_FAST_FOR_EACH_ISA(fp32_sums, weighted_sums_kernel<W, float>)
NABLA_FAST_FOR_EACH_ISA(bf16_sums, weighted_sums_kernel<W, uint16_t>)

}  // namespace

void add_weighted_sums(const float* weights, int lanes, int rows, const Table& table, int tokens,
                       float* sums, bool bf16_weights) {
  const nabla_fast_isa isa = nabla_fast_cpu_isa();
  if (table.dtype == NABLA_FAST_BFLOAT16 && isa >= NABLA_FAST_ISA_AMX)
    return add_weighted_sums_amx(weights, lanes, rows, table, tokens, sums,
                                 Prefetcher{static_cast<const char*>(table.from(tokens).data)},
                                 bf16_weights);
  const bool pairs = bf16_weights && rounds_weights(table, isa);
  auto* const run = (table.dtype == NABLA_FAST_FLOAT32 ? fp32_sums : bf16_sums).select(isa);
  for (int t = 0; t < tokens; t += kVocabTileTokens) {
    const int some = std::min(kVocabTileTokens, tokens - t);
    const Table tile = table.from(t);
    const Prefetcher prefetcher{static_cast<const char*>(tile.from(some).data)};
    if (pairs)
      add_weighted_sums_pairs(weights + t * lanes, lanes, rows, tile, some, sums, prefetcher);
    else
      run(weights + t * lanes, lanes, rows, tile, some, sums, prefetcher);
  }
}

}  // namespace nabla_fast::gemm
