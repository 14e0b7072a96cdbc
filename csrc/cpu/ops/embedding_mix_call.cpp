#include "ops/embedding_mix_call.h"

namespace nabla_fast::mix {

nabla_fast_status check_mix(const nabla_fast_mix_args& call) {
  if (call.rows < 0 || call.vocab < 1 || call.table_count < 0) return NABLA_FAST_INVALID_SHAPE;
  if (!is_tau(call.tau)) return NABLA_FAST_INVALID_TAU;
  if (call.rows == 0) return NABLA_FAST_OK;
  if (!(Size(call.vocab) * call.rows).fits() || !fits({{call.rows, 1}}, 8) ||
      !fits({{call.table_count, 1}}, sizeof(nabla_fast_matrix)))
    return NABLA_FAST_TOO_LARGE;
  if (!call.noise_seed != !call.noise_position || (call.table_count > 0 && !call.tables))
    return NABLA_FAST_INVALID_POINTER;
  if (is_linear(call)) {
    // All three missing is no mix of hidden states without columns.
    if (!call.hidden.data || !call.head.data) return NABLA_FAST_INVALID_POINTER;
    const int64_t width = call.head.width;
    if (const auto refused = check_matrix(call.hidden, call.rows, width)) return refused;
    if (const auto refused = check_matrix(call.head, call.vocab, width)) return refused;
  } else if (const auto refused = check_matrix(call.logits, call.rows, call.vocab)) {
    return refused;
  }
  for (int64_t t = 0; t < call.table_count; ++t)
    if (const auto refused = check_matrix(call.tables[t], call.vocab, call.tables[t].width))
      return refused;
  return NABLA_FAST_OK;
}

void list_inputs(const nabla_fast_mix_args& call, Arrays& arrays) {
  if (is_linear(call)) {
    arrays.reads(array_of(call.hidden, call.rows));
    arrays.reads(array_of(call.head, call.vocab));
  } else {
    arrays.reads(array_of(call.logits, call.rows));
  }
  for (const int64_t* keys : {call.noise_seed, call.noise_position})
    arrays.reads(array_of(keys, call.rows));
  arrays.reads(array_of(call.tables, call.table_count));
  for (int64_t t = 0; t < call.table_count; ++t) arrays.reads(array_of(call.tables[t], call.vocab));
}

Size Cotangents::bytes(const nabla_fast_mix_args& call) {
  Size sum = (Size(call.table_count) * static_cast<int64_t>(sizeof(gemm::PackedRows)))
                 .rounded_up(kAlignment);
  for (int64_t t = 0; t < call.table_count; ++t)
    sum = sum + RowGroup::packed_bytes(call.tables[t].width);
  return sum;
}

void Cotangents::pack(int64_t first, int rows) {
  first_ = first;
  rows_ = rows;
  char* memory = memory_ + Size(call_.table_count * static_cast<int64_t>(sizeof(gemm::PackedRows)))
                               .rounded_up(kAlignment)
                               .or_zero();
  for (int64_t t = 0; t < call_.table_count; ++t) {
    packed()[t] = gemm::pack_rows(gemm::table_of(call_.cotangents[t], call_.rows).from(first), rows,
                                  call_.tables[t].dtype, memory);
    memory += RowGroup::packed_bytes(call_.tables[t].width).or_zero();
  }
}

void Cotangents::gradient(int64_t token, int tokens, float* grad) const {
  for (int64_t t = 0; t < call_.table_count; ++t)
    gemm::products(packed()[t], gemm::table_of(call_.tables[t], call_.vocab).from(token), tokens,
                   t > 0, grad);
  if (call_.table_count == 0) std::fill(grad, grad + tokens * gemm::lanes_of(rows_), 0.0f);
  if (!call_.direct.data) return;
  alignas(64) float tile[softmax::kTileFloats];
  softmax::load_tile(gemm::table_of(call_.direct, call_.rows).from(first_), rows_, token, tokens,
                     tile);
  softmax::add_tile(tile, rows_, tokens, grad);
}

}  // namespace nabla_fast::mix
