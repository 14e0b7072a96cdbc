// add_weighted_sums(), for each instruction set.

#include "gemm/weighted_sums.h"

#include "base/isa.h"
#include "base/prefetch.h"
#include "gemm/amx.h"
#include "gemm/vocab_tiles.h"

namespace nabla_fast::gemm {
namespace {

template <int W>
NABLA_FAST_INLINE void weighted_sums(const float* weights, int lanes, int rows, const Table& table,
                                     int tokens, float* add_weighted_sums) {
  const Prefetcher prefetcher{static_cast<const char*>(table.from(tokens).data)};
  // Few rows read the tile once or twice: the whole next tile has to arrive meanwhile.
  if (rows < 32)
    add_weighted_sums_in_place<W, 1>(weights, lanes, rows, table, tokens, add_weighted_sums,
                                     prefetcher);
  else if (table.dtype == NABLA_FAST_BFLOAT16)
    add_weighted_sums_in_fp32<W>(weights, lanes, rows, table, tokens, add_weighted_sums,
                                 prefetcher);
  else
    add_weighted_sums_in_place<W, 4>(weights, lanes, rows, table, tokens, add_weighted_sums,
                                     prefetcher);
}

using WeightedSums = void(const float*, int, int, const Table&, int, float*);

void weighted_sums_baseline(const float* w, int lanes, int rows, const Table& t, int n, float* m) {
  weighted_sums<4>(w, lanes, rows, t, n, m);
}
NABLA_FAST_TARGET_AVX2 void weighted_sums_avx2(const float* w, int lanes, int rows, const Table& t,
                                               int n, float* m) {
  weighted_sums<8>(w, lanes, rows, t, n, m);
}
NABLA_FAST_TARGET_AVX512 void weighted_sums_avx512(const float* w, int lanes, int rows,
                                                   const Table& t, int n, float* m) {
  weighted_sums<16>(w, lanes, rows, t, n, m);
}

}  // namespace

void add_weighted_sums(const float* weights, int lanes, int rows, const Table& table, int tokens,
                       float* add_weighted_sums) {
  if (table.dtype == NABLA_FAST_BFLOAT16 && nabla_fast_cpu_isa() >= NABLA_FAST_ISA_AMX)
    return add_weighted_sums_amx(weights, lanes, rows, table, tokens, add_weighted_sums,
                                 Prefetcher{static_cast<const char*>(table.from(tokens).data)});
  static_cast<WeightedSums*>(
      select_isa(weighted_sums_baseline, weighted_sums_avx2, weighted_sums_avx512))(
      weights, lanes, rows, table, tokens, add_weighted_sums);
}

}  // namespace nabla_fast::gemm
