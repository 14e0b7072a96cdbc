// The largest logit of each slice of a row and its token: what a maximum of a row is joined from.
#ifndef NABLA_FAST_CUDA_ROW_TOPS_H_
#define NABLA_FAST_CUDA_ROW_TOPS_H_

#include "exponential.h"
#include "joins.h"
#include "nabla_fast_cuda.h"
#include "slices.h"

namespace nabla_fast::cuda {

struct RowTops {
  float* value;  // [rows, slices] NaN where a logit of the slice is
  int* token;    // [rows, slices] the first of equal ones
};

// Fills the slices of a chunk; a block has one of them.
template <typename T, bool kNoise>
__global__ void __launch_bounds__(kThreads)
    tops_kernel(Rows<const T> logits, Noise noise, Chunk chunk, RowTops tops) {
  const SliceOfRow at(chunk);
  const Elements z = load_logits<kNoise>(logits, noise, at);
  Top top = no_top();
  bool nan = false;
  NABLA_FAST_UNROLL
  for (int n = 0; n < kThreadTokens; ++n) {
    nan = nan || z.of[n] != z.of[n];
    // A thread's tokens come in order.
    if (z.of[n] > top.value) top = {z.of[n], at.token(n / 4) + n % 4};
  }
  top = join_block(top, Largest{});
  nan = any_of_block(nan);
  if (threadIdx.x != 0) return;
  tops.value[at.row * chunk.slices + at.slice] = nan ? kNaN : top.value;
  tops.token[at.row * chunk.slices + at.slice] = top.token;
}

struct RowTop {
  Top top;  // among numbers
  nabla_fast_status status;
};

// Of a row, by one warp.
NABLA_FAST_DEVICE RowTop join_tops(const RowTops& tops, int64_t row, int slices) {
  Top top = no_top();
  bool nan = false;
  for (int slice = lane(); slice < slices; slice += static_cast<int>(kWarpThreads)) {
    const Top here = {tops.value[row * slices + slice], tops.token[row * slices + slice]};
    nan = nan || here.value != here.value;
    top = Largest{}(top, here);
  }
  top = join_warp(top, Largest{});
  nabla_fast_status status = NABLA_FAST_OK;
  if (any_of_warp(nan))
    status = NABLA_FAST_ROW_NAN;
  else if (top.value == kInfinity)
    status = NABLA_FAST_ROW_INFINITE;
  else if (top.value == -kInfinity)
    status = NABLA_FAST_ROW_ALL_MASKED;
  return {top, status};
}

}  // namespace nabla_fast::cuda

#endif  // NABLA_FAST_CUDA_ROW_TOPS_H_
