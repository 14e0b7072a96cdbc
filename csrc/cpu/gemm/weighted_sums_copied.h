// Weighted sums of table rows for many rows of weights: strips of columns, copied to float32.
#ifndef NABLA_FAST_CPU_GEMM_WEIGHTED_SUMS_COPIED_H_
#define NABLA_FAST_CPU_GEMM_WEIGHTED_SUMS_COPIED_H_

#include <algorithm>
#include <cstdint>

#include "base/prefetch.h"
#include "gemm/vocab_tiles.h"
#include "gemm/weighted_sums.h"
#include "simd/bf16.h"

namespace nabla_fast::gemm {

// Columns of a strip: twice what a register tile has, or four times.
template <int W>
constexpr int kStripColumns = W == 8 ? 48 : 32;

// Copies the next strip of a tile, and prefetches the next tile, while sums of a strip are formed: a
// copy on its own would wait for the second-level cache, the prefetches for memory.
template <int W, typename T>
struct StripCopier {
  Table table;
  int tokens;
  Prefetcher prefetcher;
  float* to = nullptr;
  int64_t column = 0, columns = 0;
  int token = 0;  // the next

  NABLA_FAST_INLINE void begin(int64_t first, float* strip) {
    to = strip;
    column = first;
    columns = std::min<int64_t>(kStripColumns<W>, table.width - first);
    token = columns > 0 ? 0 : tokens;
  }
  NABLA_FAST_INLINE void copy_token() {
    const T* const from = static_cast<const T*>(table.data) + token * table.stride + column;
    nabla_fast::copy_to_fp32<W>(from, columns, to + token * kStripColumns<W>);
    ++token;
  }
  template <int kBytes>
  NABLA_FAST_INLINE void advance() {
    prefetcher.advance<kStripColumns<W> * sizeof(T)>();
    if (token < tokens) copy_token();
  }
  NABLA_FAST_INLINE void end() {
    while (token < tokens) copy_token();
  }
};

// add_weighted_sums() for many rows, where copying elements once pays: strips of columns, which stay in the
// first-level cache whatever the table's stride is, one read while the next is copied.
template <int W, typename T>
NABLA_FAST_INLINE void add_weighted_sums_copied(const float* weights, int lanes, int rows,
                                                const Table& table, int tokens, float* sums,
                                                Prefetcher prefetcher) {
  constexpr int kRows = kRowsAtOnce<W>;
  // A token is copied as often as kRowsPerGroup rows pass over as many multiply-adds.
  constexpr int kTokensPerCopy =
      kRowsPerGroup / kRows * kStripColumns<W> / (kVectorsOfRow<W, kRows> * W);
  alignas(64) float strips[2][kVocabTileTokens * kStripColumns<W>];
  StripCopier<W, T> copier{table, tokens, prefetcher};
  copier.begin(0, strips[0]);
  copier.end();
  for (int64_t k = 0; k < table.width; k += kStripColumns<W>) {
    const int64_t strip = k / kStripColumns<W> % 2;
    copier.begin(k + kStripColumns<W>, strips[1 - strip]);
    const Table copied{strips[strip], NABLA_FAST_FLOAT32,
                       std::min<int64_t>(kStripColumns<W>, table.width - k), kStripColumns<W>};
    add_all_rows<W, kRows, kTokensPerCopy, float>(weights, lanes, rows, copied, tokens, sums + k,
                                                  padded(table.width), copier);
    copier.end();
  }
}

}  // namespace nabla_fast::gemm

#endif  // NABLA_FAST_CPU_GEMM_WEIGHTED_SUMS_COPIED_H_
