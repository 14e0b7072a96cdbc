// Checks of a descent's call that no memory has to be read for: of the kernels of the CPU and of devices.
#ifndef NABLA_FAST_CPU_OPS_DTO_DESCENT_CALL_H_
#define NABLA_FAST_CPU_OPS_DTO_DESCENT_CALL_H_

#include <cstddef>
#include <cstdint>

#include "base/args.h"
#include "base/check.h"
#include "base/overlap.h"
#include "nabla_fast.h"

namespace nabla_fast {

template <>
inline constexpr int64_t kFirstVersionBytes<nabla_fast_descent_args> =
    offsetof(nabla_fast_descent_args, head_map);

}  // namespace nabla_fast

namespace nabla_fast::descent {

// OK, or why what a call reads, its head aside, is refused.
inline nabla_fast_status check_inputs(const nabla_fast_descent_args& call) {
  if (call.rows < 0 || call.vocab < 1 || call.iters < 0) return NABLA_FAST_INVALID_SHAPE;
  if (!is_tau(call.tau)) return NABLA_FAST_INVALID_TAU;
  if (call.rows == 0) return NABLA_FAST_OK;
  if (const auto refused = check_float32(call.grad, call.rows, call.vocab)) return refused;
  if (!fits({{call.rows, call.schedule_stride}, {call.iters, 1}}, 8) ||
      !fits({{call.rows, 1}}, 64) || !fits({{call.vocab, 1}}, 64))
    return NABLA_FAST_TOO_LARGE;
  if ((call.iters > 0 && !call.schedule) || !call.noise_seed != !call.noise_position)
    return NABLA_FAST_INVALID_POINTER;
  return NABLA_FAST_OK;
}

// The same of what it writes, its rows being [columns] and its workspace `bytes`. head: null where
// there is none.
inline nabla_fast_status check_outputs(const nabla_fast_descent_args& call, int64_t columns,
                                       const nabla_fast_matrix* head, int64_t bytes) {
  const nabla_fast_output* const changed[] = {&call.parameter, &call.exp_avg, &call.exp_avg_sq};
  for (const nabla_fast_output* matrix : changed)
    if (const auto refused = check_float32(*matrix, call.rows, columns)) return refused;
  if (!call.step || !call.token || !call.flipped || !call.row_status)
    return NABLA_FAST_INVALID_POINTER;
  if (const auto refused = check_workspace(call, bytes)) return refused;
  const bool overlap = any_overlap([&](auto& arrays) {
    for (const nabla_fast_output* matrix : changed) arrays.writes(array_of(*matrix, call.rows));
    arrays.writes(array_of(call.step, call.rows));
    arrays.writes(array_of(call.token, call.rows));
    arrays.writes(array_of(call.flipped, call.rows));
    arrays.writes(array_of(call.row_status, call.rows));
    arrays.writes(array_of_bytes(call.workspace, bytes));
    if (head) {
      arrays.reads(array_of(*head, call.vocab));
      arrays.reads(array_of(call.head_map.bias, call.vocab));
    }
    arrays.reads(array_of(call.grad, call.rows));
    arrays.reads({call.schedule, {{call.rows, call.schedule_stride}}, call.iters, 8});
    for (const int64_t* array : {call.until, call.group, call.noise_seed, call.noise_position})
      arrays.reads(array_of(array, call.rows));
  });
  return overlap ? NABLA_FAST_OVERLAP : NABLA_FAST_OK;
}

// Whether rows wait for each other: one alone has none to wait for.
inline bool waits(const nabla_fast_descent_args& call) { return call.group && call.rows > 1; }

}  // namespace nabla_fast::descent

#endif  // NABLA_FAST_CPU_OPS_DTO_DESCENT_CALL_H_
