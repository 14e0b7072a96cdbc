#include "ops/embedding_mix_call.h"

namespace nabla_fast::mix {

nabla_fast_status check_matrix(const nabla_fast_table& matrix, int64_t rows) {
  if (matrix.width < 0) return NABLA_FAST_INVALID_SHAPE;
  if (!is_dtype(matrix.dtype)) return NABLA_FAST_UNKNOWN_DTYPE;
  if (!fits({{rows, matrix.stride}, {matrix.width, 1}}, bytes_of(matrix.dtype)))
    return NABLA_FAST_TOO_LARGE;
  if (!matrix.data && rows > 0 && matrix.width > 0) return NABLA_FAST_INVALID_POINTER;
  return NABLA_FAST_OK;
}

nabla_fast_status check_mix(const nabla_fast_mix* inputs) {
  if (!inputs) return NABLA_FAST_INVALID_POINTER;
  const nabla_fast_mix& call = *inputs;
  if (call.rows < 0 || call.vocab < 1 || call.table_count < 0) return NABLA_FAST_INVALID_SHAPE;
  if (!is_tau(call.tau)) return NABLA_FAST_INVALID_TAU;
  if (call.rows == 0) return NABLA_FAST_OK;
  if (!(Size(call.vocab) * call.rows).fits() || !fits({{call.rows, 1}}, 8) ||
      !fits({{call.table_count, 1}}, sizeof(nabla_fast_table)))
    return NABLA_FAST_TOO_LARGE;
  if ((call.noise_seed == nullptr) != (call.noise_position == nullptr) ||
      (call.table_count > 0 && !call.tables))
    return NABLA_FAST_INVALID_POINTER;
  if (is_linear(call)) {
    if (call.hidden.width != call.head.width) return NABLA_FAST_INVALID_SHAPE;
    if (const auto status = check_matrix(call.hidden, call.rows)) return status;
    if (const auto status = check_matrix(call.head, call.vocab)) return status;
  } else {
    if (call.logits.width != call.vocab) return NABLA_FAST_INVALID_SHAPE;
    if (const auto status = check_matrix(call.logits, call.rows)) return status;
  }
  for (int64_t t = 0; t < call.table_count; ++t)
    if (const auto status = check_matrix(call.tables[t], call.vocab)) return status;
  return NABLA_FAST_OK;
}

nabla_fast_status check_cotangents(const nabla_fast_mix& call, const nabla_fast_table* cotangents,
                                   const nabla_fast_table* direct) {
  if (call.rows == 0) return NABLA_FAST_OK;
  if (call.table_count > 0 && !cotangents) return NABLA_FAST_INVALID_POINTER;
  for (int64_t t = 0; t < call.table_count; ++t) {
    if (cotangents[t].width != call.tables[t].width) return NABLA_FAST_INVALID_SHAPE;
    if (const auto status = check_matrix(cotangents[t], call.rows)) return status;
  }
  if (!direct || !direct->data) return NABLA_FAST_OK;
  if (direct->width != call.vocab) return NABLA_FAST_INVALID_SHAPE;
  return check_matrix(*direct, call.rows);
}

Size Cotangents::bytes(const nabla_fast_mix& call) {
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
    packed()[t] = gemm::pack_rows(gemm::table_of(cotangents_[t], call_.rows).from(first), rows,
                                  call_.tables[t].dtype, memory);
    memory += RowGroup::packed_bytes(call_.tables[t].width).or_zero();
  }
}

void Cotangents::gradient(int64_t token, int tokens, float* grad) const {
  for (int64_t t = 0; t < call_.table_count; ++t)
    gemm::products(packed()[t], gemm::table_of(call_.tables[t], call_.vocab).from(token), tokens,
                   t > 0, grad);
  if (call_.table_count == 0) std::fill(grad, grad + tokens * gemm::lanes_of(rows_), 0.0f);
  if (!direct_ || !direct_->data) return;
  alignas(64) float tile[softmax::kTileFloats];
  softmax::load_tile(gemm::table_of(*direct_, call_.rows).from(first_), rows_, token, tokens, tile);
  softmax::add_tile(tile, rows_, tokens, grad);
}

}  // namespace nabla_fast::mix
