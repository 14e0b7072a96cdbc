// Checks of an embedding mix.

#include "call.h"
#include "mix_logits.h"

namespace nabla_fast::cuda {

nabla_fast_status check_mix(const nabla_fast_mix_args& call) {
  if (call.rows < 0 || call.vocab < 1 || call.table_count < 0) return NABLA_FAST_INVALID_SHAPE;
  if (!is_tau(call.tau)) return NABLA_FAST_INVALID_TAU;
  if (call.rows == 0) return NABLA_FAST_OK;
  if (call.vocab > kMostTokens || !(Size(call.vocab) * call.rows).fits() ||
      !fits({{call.rows, 1}}, 8) || !fits({{call.table_count, 1}}, sizeof(nabla_fast_matrix)))
    return NABLA_FAST_TOO_LARGE;
  if (!call.noise_seed != !call.noise_position || (call.table_count > 0 && !call.tables))
    return NABLA_FAST_INVALID_POINTER;
  if (is_linear(call)) {
    // All three missing is no mix of hidden states without columns.
    if (!call.hidden.data || !call.head.data) return NABLA_FAST_INVALID_POINTER;
    const int64_t width = call.head.width;
    if (const auto refused = check_device_matrix(call.hidden, call.rows, width)) return refused;
    if (const auto refused = check_device_matrix(call.head, call.vocab, width)) return refused;
  } else if (const auto refused = check_device_matrix(call.logits, call.rows, call.vocab)) {
    return refused;
  }
  for (int64_t t = 0; t < call.table_count; ++t)
    if (const auto refused = check_device_matrix(call.tables[t], call.vocab, call.tables[t].width))
      return refused;
  return NABLA_FAST_OK;
}

void list_mix_inputs(const nabla_fast_mix_args& call, Arrays& arrays) {
  if (is_linear(call)) {
    arrays.reads(array_of(call.hidden, call.rows));
    arrays.reads(array_of(call.head, call.vocab));
  } else {
    arrays.reads(array_of(call.logits, call.rows));
  }
  if (call.noise_seed) {
    arrays.reads(array_of(call.noise_seed, call.rows));
    arrays.reads(array_of(call.noise_position, call.rows));
  }
  for (int64_t t = 0; t < call.table_count; ++t) arrays.reads(array_of(call.tables[t], call.vocab));
}

}  // namespace nabla_fast::cuda
