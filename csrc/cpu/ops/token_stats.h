// Checks and results of statistics, of logits or of hidden states.
#ifndef NABLA_FAST_CPU_OPS_TOKEN_STATS_H_
#define NABLA_FAST_CPU_OPS_TOKEN_STATS_H_

#include <cmath>
#include <cstddef>
#include <cstdint>

#include "base/args.h"
#include "base/check.h"
#include "base/floats.h"
#include "base/overlap.h"
#include "nabla_fast.h"
#include "softmax/row_status.h"
#include "softmax/token_sums.h"

namespace nabla_fast {

template <>
inline constexpr int64_t kFirstVersionBytes<nabla_fast_stats_args> =
    offsetof(nabla_fast_stats_args, head_map);

}  // namespace nabla_fast

namespace nabla_fast::stats {

inline nabla_fast_status check_stats(const nabla_fast_stats_args& call) {
  if (call.rows < 0 || call.vocab < 1) return NABLA_FAST_INVALID_SHAPE;
  return is_tau(call.tau) ? NABLA_FAST_OK : NABLA_FAST_INVALID_TAU;
}

inline nabla_fast_status check_results(const nabla_fast_stats_args& call) {
  if (!fits({{call.rows, 1}}, sizeof(int64_t))) return NABLA_FAST_TOO_LARGE;
  return call.logsumexp && call.confidence && call.entropy && call.argmax && call.row_status
             ? NABLA_FAST_OK
             : NABLA_FAST_INVALID_POINTER;
}

inline void list_results(const nabla_fast_stats_args& call, Arrays& arrays) {
  arrays.writes(array_of(call.logsumexp, call.rows));
  arrays.writes(array_of(call.confidence, call.rows));
  arrays.writes(array_of(call.entropy, call.rows));
  arrays.writes(array_of(call.argmax, call.rows));
  arrays.writes(array_of(call.row_status, call.rows));
}

// Writes a row's results.
inline void write_stats(const nabla_fast_stats_args& call, int64_t row,
                        const softmax::TokenSums& sums, const softmax::Tau& tau) {
  call.row_status[row] = softmax::row_status(sums.max, sums.nan);
  if (call.row_status[row] != NABLA_FAST_OK) {
    call.logsumexp[row] = call.confidence[row] = call.entropy[row] = kNaN;
    call.argmax[row] = -1;
    return;
  }
  const double total = sums.at_max + sums.sum_exp;
  const double log_total = std::log(sums.at_max) + std::log1p(sums.sum_exp / sums.at_max);
  call.logsumexp[row] = static_cast<float>(sums.max / tau.value + log_total);
  call.confidence[row] = static_cast<float>(1 / total);
  call.entropy[row] = static_cast<float>(log_total - sums.sum_d_exp / tau.value / total);
  call.argmax[row] = sums.argmax;
}

}  // namespace nabla_fast::stats

#endif  // NABLA_FAST_CPU_OPS_TOKEN_STATS_H_
