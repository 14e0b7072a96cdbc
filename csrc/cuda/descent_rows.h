// What both descents are told of their rows beside the parameter: how far a row goes, and where they say
// how it ended.
#ifndef NABLA_FAST_CUDA_DESCENT_ROWS_H_
#define NABLA_FAST_CUDA_DESCENT_ROWS_H_

#include "call.h"
#include "descent_row.h"
#include "device.h"
#include "exponential.h"
#include "joins.h"
#include "nabla_fast_cuda.h"
#include "ops/dto_descent_call.h"

namespace nabla_fast::cuda {

struct DescentRows {
  int64_t* step;
  const double* schedule;
  int64_t iters, schedule_stride;
  const int64_t *until, *group;
  int64_t* token;
  uint8_t* flipped;
  nabla_fast_status* status;
  int64_t rows;
  int64_t* flip_after;  // [rows] steps after which a row's token moves; null where none waits
};

// flip_after: of the workspace.
inline DescentRows descent_rows(const nabla_fast_descent_args& call, int64_t* flip_after) {
  return {call.step,       call.schedule, call.iters, step_of(call.rows, call.schedule_stride),
          call.until,      call.group,    call.token, call.flipped,
          call.row_status, call.rows,     flip_after};
}

constexpr int64_t kNever = INT64_MAX;

struct Outcome {
  int64_t taken;  // steps
  int token;
  bool flipped;
  bool spoiled;  // the row became NaN
};

struct Least {
  NABLA_FAST_DEVICE int64_t operator()(int64_t a, int64_t b) const { return a < b ? a : b; }
};

struct LeastOfWarps {
  int64_t of[kDescentWarps];
};

// After how many steps the first row of a row's group moves its token.
NABLA_FAST_DEVICE int64_t steps_of_group(const DescentRows& call, int64_t row) {
  NABLA_FAST_SHARED(LeastOfWarps, warps);
  int64_t least = kNever;
  for (int64_t other = threadIdx.x; other < call.rows; other += kDescentThreads)
    if (call.group[other] == call.group[row]) least = Least{}(least, call.flip_after[other]);
  least = join_warp(least, Least{});
  // Those of the row before have been read.
  sync_block();
  if (lane() == 0) warps.of[warp()] = least;
  sync_block();
  return join_warp(lane() < kDescentWarps ? warps.of[lane()] : kNever, Least{});
}

// Steps that a row has left after `before` at most. `count`: this launch finds call.flip_after.
NABLA_FAST_DEVICE int64_t steps_left(const DescentRows& call, int64_t row, int64_t before,
                                     bool count) {
  const int64_t end = call.until && call.until[row] < call.iters ? call.until[row] : call.iters;
  const int64_t left = before >= 0 && end > before ? end - before : 0;
  return call.flip_after && !count ? Least{}(left, steps_of_group(call, row)) : left;
}

NABLA_FAST_DEVICE nabla_fast_status status_of(float top) {
  if (top != top) return NABLA_FAST_ROW_NAN;
  if (top == kInfinity) return NABLA_FAST_ROW_INFINITE;
  return top == -kInfinity ? NABLA_FAST_ROW_ALL_MASKED : NABLA_FAST_OK;
}

// By one thread.
NABLA_FAST_DEVICE void tell(const DescentRows& call, int64_t row, int64_t before,
                            const Outcome& outcome, nabla_fast_status status, bool count) {
  if (count) {
    call.flip_after[row] = outcome.flipped ? outcome.taken : kNever;
    return;
  }
  call.step[row] = before + outcome.taken;
  call.token[row] = status == NABLA_FAST_OK ? outcome.token : -1;
  call.flipped[row] = outcome.flipped;
  call.status[row] = status;
}

// OK, or why what a call reads, its head aside, is refused.
inline nabla_fast_status check_descent(const nabla_fast_descent_args& call) {
  if (const auto refused = descent::check_inputs(call)) return refused;
  return call.vocab > kMostTokens ? NABLA_FAST_TOO_LARGE : NABLA_FAST_OK;
}

inline int64_t rounded_up(int64_t count, int64_t unit) { return (count + unit - 1) / unit * unit; }
inline int64_t blocks_for(int64_t count, int64_t of_each) {
  return (count + of_each - 1) / of_each;
}

}  // namespace nabla_fast::cuda

#endif  // NABLA_FAST_CUDA_DESCENT_ROWS_H_
