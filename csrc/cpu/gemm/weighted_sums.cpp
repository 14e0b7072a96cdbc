// mix(), for each instruction set.

#include "gemm/weighted_sums.h"

#include "base/isa.h"
#include "base/prefetch.h"
#include "gemm/amx.h"
#include "gemm/vocab_tiles.h"

namespace nabla_fast::gemm {
namespace {

template <int W>
NABLA_FAST_INLINE void mix_tile(const float* weights, int lanes, int rows, const Table& table,
                                int tokens, float* mix) {
  const Ahead ahead{static_cast<const char*>(table.from(tokens).data)};
  // Few rows pass over the tile once or twice: meanwhile the next has to come whole.
  if (rows < 32)
    straight_mix<W, 1>(weights, lanes, rows, table, tokens, mix, ahead);
  else if (table.dtype == NABLA_FAST_BFLOAT16)
    widened_mix<W>(weights, lanes, rows, table, tokens, mix, ahead);
  else
    straight_mix<W, 4>(weights, lanes, rows, table, tokens, mix, ahead);
}

using Mix = void(const float*, int, int, const Table&, int, float*);

void mix_baseline(const float* w, int lanes, int rows, const Table& t, int n, float* m) {
  mix_tile<4>(w, lanes, rows, t, n, m);
}
NABLA_FAST_TARGET_AVX2 void mix_avx2(const float* w, int lanes, int rows, const Table& t, int n,
                                     float* m) {
  mix_tile<8>(w, lanes, rows, t, n, m);
}
NABLA_FAST_TARGET_AVX512 void mix_avx512(const float* w, int lanes, int rows, const Table& t, int n,
                                         float* m) {
  mix_tile<16>(w, lanes, rows, t, n, m);
}

}  // namespace

void mix(const float* weights, int lanes, int rows, const Table& table, int tokens, float* mix) {
  if (table.dtype == NABLA_FAST_BFLOAT16 && nabla_fast_cpu_isa() >= NABLA_FAST_ISA_AMX)
    return mix_amx(weights, lanes, rows, table, tokens, mix,
                   Ahead{static_cast<const char*>(table.from(tokens).data)});
  static_cast<Mix*>(select_isa(mix_baseline, mix_avx2, mix_avx512))(weights, lanes, rows, table,
                                                                    tokens, mix);
}

}  // namespace nabla_fast::gemm
