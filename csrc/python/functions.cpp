// The functions of nabla_fast.h, and the fields of their structs in the header's order.

#include <pybind11/pybind11.h>

#include "arguments.h"
#include "bindings.h"
#include "nabla_fast.h"

#define FIELD(name) {#name, &set_field<&Args::name, Args>}
#define ARRAY(name) {#name, &set_array<&Args::name, &Args::table_count, Args>}
// A tensor, and fields that are its first sizes.
#define SIZED(name, ...) {#name, &set_sized<&Args::name, Args, __VA_ARGS__>}
#define CALL_FIELDS FIELD(workspace), FIELD(workspace_bytes), FIELD(num_threads)
#define ROW_FIELDS CALL_FIELDS, FIELD(rows), FIELD(vocab)

namespace nabla_fast::bindings {
namespace {

std::vector<Field<nabla_fast_stats_args>> stats_fields() {
  using Args = nabla_fast_stats_args;
  return {ROW_FIELDS,    FIELD(logits),     FIELD(hidden),     FIELD(head),
          FIELD(tau),    FIELD(logsumexp),  FIELD(confidence), FIELD(entropy),
          FIELD(argmax), FIELD(row_status), FIELD(head_map)};
}

std::vector<Field<nabla_fast_draw_args>> draw_fields() {
  using Args = nabla_fast_draw_args;
  return {ROW_FIELDS,   FIELD(logits),   FIELD(seed),   FIELD(start),
          FIELD(visit), FIELD(position), FIELD(redraw), FIELD(tau),
          FIELD(top_k), FIELD(top_p),    FIELD(token),  FIELD(row_status)};
}

std::vector<Field<nabla_fast_lm_logits_args>> lm_logits_fields() {
  using Args = nabla_fast_lm_logits_args;
  return {ROW_FIELDS, FIELD(hidden), FIELD(head), FIELD(logits), FIELD(head_map)};
}

std::vector<Field<nabla_fast_nll_grad_args>> nll_grad_fields() {
  using Args = nabla_fast_nll_grad_args;
  return {ROW_FIELDS,  FIELD(hidden),     FIELD(head),    FIELD(targets),
          FIELD(grad), FIELD(row_status), FIELD(head_map)};
}

std::vector<Field<nabla_fast_descent_args>> descent_fields() {
  using Args = nabla_fast_descent_args;
  return {
      ROW_FIELDS,   FIELD(parameter), FIELD(exp_avg),    FIELD(exp_avg_sq), FIELD(step),
      FIELD(head),  FIELD(grad),      FIELD(schedule),   FIELD(iters),      FIELD(schedule_stride),
      FIELD(until), FIELD(group),     FIELD(tau),        FIELD(noise_seed), FIELD(noise_position),
      FIELD(token), FIELD(flipped),   FIELD(row_status), FIELD(head_map)};
}

std::vector<Field<nabla_fast_mix_args>> mix_fields() {
  using Args = nabla_fast_mix_args;
  return {ROW_FIELDS,        FIELD(logits),     FIELD(hidden),         FIELD(head),
          FIELD(tau),        FIELD(noise_seed), FIELD(noise_position), ARRAY(tables),
          FIELD(row_status), FIELD(hard),       ARRAY(mixes),          ARRAY(cotangents),
          FIELD(direct),     FIELD(grad),       FIELD(perturbed)};
}

std::vector<Field<nabla_fast_onehot_args>> onehot_fields() {
  using Args = nabla_fast_onehot_args;
  return {ROW_FIELDS,        FIELD(hidden), FIELD(head),       FIELD(nll_coeff),
          ARRAY(cotangents), ARRAY(tables), ARRAY(token_maps), ARRAY(table_rows),
          FIELD(row_status), FIELD(grad),   FIELD(norm),       FIELD(head_map)};
}

std::vector<Field<nabla_fast_attention_args>> attention_fields() {
  using Args = nabla_fast_attention_args;
  return {CALL_FIELDS,
          FIELD(batch),
          FIELD(heads),
          FIELD(kv_heads),
          FIELD(suffix),
          FIELD(dim),
          FIELD(blocks),
          FIELD(block_size),
          FIELD(table_width),
          FIELD(window),
          FIELD(scale),
          FIELD(softcap),
          FIELD(sinks),
          SIZED(q, &Args::batch, &Args::heads, &Args::suffix, &Args::dim),
          FIELD(k),
          FIELD(v),
          SIZED(key_pool, &Args::blocks, &Args::block_size, &Args::kv_heads),
          FIELD(value_pool),
          SIZED(block_tables, &Args::batch, &Args::table_width),
          FIELD(table_stride),
          FIELD(prefix_lengths),
          FIELD(output),
          FIELD(logsumexp),
          FIELD(cotangent),
          FIELD(dq),
          FIELD(dk),
          FIELD(dv)};
}

}  // namespace

#define BIND(name, fields) \
  bind_function(module, #name, &nabla_fast_##name, &nabla_fast_##name##_workspace, fields())
#define BIND_PLAIN(name, fields) bind_function(module, #name, &nabla_fast_##name, nullptr, fields())

void bind_functions(pybind11::module_& module) {
  BIND_PLAIN(token_stats, stats_fields);
  BIND(linear_token_stats, stats_fields);
  BIND(draw_tokens, draw_fields);
  BIND_PLAIN(lm_logits, lm_logits_fields);
  BIND(nll_grad, nll_grad_fields);
  BIND(dto_descent, descent_fields);
  BIND(dto_descent_latents, descent_fields);
  BIND(embedding_mix, mix_fields);
  BIND(embedding_mix_backward, mix_fields);
  BIND(onehot_grad, onehot_fields);
  BIND(onehot_grad_norm, onehot_fields);
  BIND_PLAIN(prefix_attention, attention_fields);
  BIND(prefix_attention_backward, attention_fields);
}

}  // namespace nabla_fast::bindings
