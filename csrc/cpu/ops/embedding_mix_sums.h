// Sums over a vocabulary, relative to the largest y that a row has shown so far, of a group's rows.
#ifndef NABLA_FAST_CPU_OPS_EMBEDDING_MIX_SUMS_H_
#define NABLA_FAST_CPU_OPS_EMBEDDING_MIX_SUMS_H_

#include <algorithm>
#include <cmath>
#include <cstdint>

#include "base/check.h"
#include "base/threads.h"
#include "gemm/vocab_tiles.h"
#include "softmax/relaxed_tiles.h"
#include "softmax/row_softmax.h"

namespace nabla_fast::mix {

// Factor of the weights in a pass whose sums stay finite: with numbers up to 2^128, those of 2^20
// tokens reach 2^84. It is for sums that overflow without it, and these lose no digit: next to them,
// terms of weights that become smaller than 2^-126 are rounding error.
constexpr float kSmallScale = 0x1p-64f;

inline void scale_tile(float* tile, int rows, int tokens, float scale) {
  if (scale == 1) return;
  for (int n = 0; n < tokens * gemm::lanes_of(rows); ++n) tile[n] *= scale;
}

// Sums of a segment, or of all segments so far. Mixes lie behind one another, as
// add_weighted_sums() has them: [rows, padded(width)] each.
struct MixSums {
  softmax::Tops tops;
  softmax::Sums sums;

  float* mixes() { return reinterpret_cast<float*>(this + 1); }

  void clear(int64_t mix_floats) {
    tops.clear();
    sums.clear();
    std::fill_n(mixes(), mix_floats, 0.0f);
  }

  static Size bytes(Size mix_floats) {
    return (Size(sizeof(MixSums)) + mix_floats * 4).rounded_up(kAlignment);
  }
};

// Rounds of `threads` segments of a group: run(segment, part) on a thread each, then join(row,
// part) for every row and every part in the order of the segments.
template <typename Run, typename Join>
void in_rounds(int64_t segments, int rows, int threads, const Run& run, const Join& join) {
#pragma omp parallel num_threads(threads) if (threads > 1)
  {
    const int64_t rank = thread_rank(), size = thread_count();
    for (int64_t round = 0; round < segments; round += size) {
      if (round + rank < segments) run(round + rank, rank);
#pragma omp barrier
      const int64_t parts = std::min(size, segments - round);
      for (int64_t r = rows * rank / size; r < rows * (rank + 1) / size; ++r)
        for (int64_t part = 0; part < parts; ++part) join(static_cast<int>(r), part);
#pragma omp barrier
    }
  }
}

}  // namespace nabla_fast::mix

#endif  // NABLA_FAST_CPU_OPS_EMBEDDING_MIX_SUMS_H_
