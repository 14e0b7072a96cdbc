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

struct SliceTop {
  Top top;   // among numbers
  bool nan;  // whether there is one among the logits
};

// Of a slice, for every thread of its block.
NABLA_FAST_DEVICE SliceTop top_of_slice(const Elements& z, const SliceOfRow& at) {
  Top top = no_top();
  bool nan = false;
  NABLA_FAST_UNROLL
  for (int n = 0; n < kThreadTokens; ++n) {
    nan = nan || z.of[n] != z.of[n];
    // A thread's tokens come in order.
    if (z.of[n] > top.value) top = {z.of[n], at.token(n / 4) + n % 4};
  }
  return {join_block(top, Largest{}), any_of_block(nan)};
}

// Fills the slices of a chunk; a block has one of them.
template <typename T, bool kNoise>
__global__ void __launch_bounds__(kThreads, kBlocksHeld<kNoise>)
    tops_kernel(Rows<const T> logits, Noise noise, Chunk chunk, RowTops tops) {
  const SliceOfRow at(chunk);
  const SliceTop found = top_of_slice(load_logits<kNoise>(logits, noise, at), at);
  if (threadIdx.x != 0) return;
  tops.value[at.row * chunk.slices + at.slice] = found.nan ? kNaN : found.top.value;
  tops.token[at.row * chunk.slices + at.slice] = found.top.token;
}

struct RowTop {
  Top top;  // among numbers
  nabla_fast_status status;
};

// Of a row, for every lane of a warp. `slice(n)`: what tops_kernel has found in slice n.
template <typename Slice>
NABLA_FAST_DEVICE RowTop top_of_row(int slices, const Slice& slice) {
  Top top = no_top();
  bool nan = false;
  for (int n = lane(); n < slices; n += static_cast<int>(kWarpThreads)) {
    const Top here = slice(n);
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
