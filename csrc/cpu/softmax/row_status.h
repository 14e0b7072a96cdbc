// Status of a row of logits.
#ifndef NABLA_FAST_CPU_SOFTMAX_ROW_STATUS_H_
#define NABLA_FAST_CPU_SOFTMAX_ROW_STATUS_H_

#include "base/floats.h"
#include "nabla_fast.h"

namespace nabla_fast::softmax {

// max: largest logit of the row, NaN left out, -inf where there is none; nan: whether one is NaN.
inline nabla_fast_status row_status(float max, bool nan) {
  if (nan) return NABLA_FAST_ROW_NAN;
  if (max == kInfinity) return NABLA_FAST_ROW_INFINITE;
  return max == -kInfinity ? NABLA_FAST_ROW_ALL_MASKED : NABLA_FAST_OK;
}

}  // namespace nabla_fast::softmax

#endif  // NABLA_FAST_CPU_SOFTMAX_ROW_STATUS_H_
