// nabla_fast._C: the C interface for Python, without torch. Tensors come as addresses (data_ptr()),
// whose memory the caller keeps alive; the GIL is released while a kernel runs.

#include "bindings.h"

#include <pybind11/pybind11.h>

#include <cstdint>
#include <memory>

#include "internal/exponential_race.h"
#include "internal/token_filter.h"
#include "internal/vec_exp_array.h"
#include "nabla_fast.h"

namespace py = pybind11;

namespace {

using nabla_fast::bindings::pointer;

nabla_fast_status token_stats(std::uintptr_t logits, nabla_fast_dtype dtype, int64_t rows,
                              int64_t vocab, int64_t row_stride, double tau,
                              std::uintptr_t logsumexp, std::uintptr_t confidence,
                              std::uintptr_t entropy, std::uintptr_t argmax,
                              std::uintptr_t row_status, int32_t num_threads) {
  return nabla_fast_token_stats(pointer<const void>(logits), dtype, rows, vocab, row_stride, tau,
                                pointer<float>(logsumexp), pointer<float>(confidence),
                                pointer<float>(entropy), pointer<int64_t>(argmax),
                                pointer<nabla_fast_status>(row_status), num_threads);
}

// Memory for a kernel to work in, as much as its size query said.
std::unique_ptr<char[]> workspace(int64_t bytes) {
  return std::unique_ptr<char[]>(new char[static_cast<size_t>(bytes)]);
}

nabla_fast_status dto_descent(std::uintptr_t z, std::uintptr_t grad, std::uintptr_t exp_avg,
                              std::uintptr_t exp_avg_sq, std::uintptr_t step, int64_t rows,
                              int64_t vocab, int64_t z_stride, int64_t grad_stride,
                              int64_t exp_avg_stride, int64_t exp_avg_sq_stride,
                              std::uintptr_t schedule, int64_t iters, int64_t schedule_stride,
                              std::uintptr_t until, std::uintptr_t group, double tau,
                              std::uintptr_t noise_seed, std::uintptr_t noise_position,
                              std::uintptr_t token, std::uintptr_t flipped,
                              std::uintptr_t row_status, int32_t num_threads) {
  const int64_t bytes = nabla_fast_dto_descent_workspace(rows, vocab, iters, noise_seed != 0,
                                                         group != 0, num_threads);
  const auto memory = workspace(bytes);
  return nabla_fast_dto_descent(
      pointer<float>(z), pointer<const float>(grad), pointer<float>(exp_avg),
      pointer<float>(exp_avg_sq), pointer<int64_t>(step), rows, vocab, z_stride, grad_stride,
      exp_avg_stride, exp_avg_sq_stride, pointer<const double>(schedule), iters, schedule_stride,
      pointer<const int64_t>(until), pointer<const int64_t>(group), tau,
      pointer<const int64_t>(noise_seed), pointer<const int64_t>(noise_position),
      pointer<int64_t>(token), pointer<uint8_t>(flipped), pointer<nabla_fast_status>(row_status),
      memory.get(), bytes, num_threads);
}

// A tensor's sizes or strides.
int64_t at(const py::tuple& sizes, size_t index) {
  return py::cast<int64_t>(PyTuple_GET_ITEM(sizes.ptr(), static_cast<Py_ssize_t>(index)));
}

nabla_fast_strides strides(const py::tuple& of) { return {at(of, 0), at(of, 1), at(of, 2)}; }

nabla_fast_pool_strides pool_strides(const py::tuple& of) {
  return {at(of, 0), at(of, 1), at(of, 2)};
}

// The inputs of an attention, as tensors' addresses, sizes and strides.
nabla_fast_attention attention(std::uintptr_t q, const py::tuple& q_shape,
                               const py::tuple& q_strides, std::uintptr_t k,
                               const py::tuple& k_strides, std::uintptr_t v,
                               const py::tuple& v_strides, std::uintptr_t key_pool,
                               const py::tuple& pool_shape, const py::tuple& key_pool_strides,
                               std::uintptr_t value_pool, const py::tuple& value_pool_strides,
                               std::uintptr_t block_tables, int64_t table_width,
                               int64_t table_stride, std::uintptr_t prefix_lengths, double scale,
                               int64_t window) {
  nabla_fast_attention inputs;
  inputs.batch = at(q_shape, 0);
  inputs.heads = at(q_shape, 1);
  inputs.suffix = at(q_shape, 2);
  inputs.dim = at(q_shape, 3);
  inputs.blocks = at(pool_shape, 0);
  inputs.block_size = at(pool_shape, 1);
  inputs.kv_heads = at(pool_shape, 2);
  inputs.table_width = table_width;
  inputs.window = window;
  inputs.scale = scale;
  inputs.q = pointer<const float>(q);
  inputs.k = pointer<const float>(k);
  inputs.v = pointer<const float>(v);
  inputs.key_pool = pointer<const float>(key_pool);
  inputs.value_pool = pointer<const float>(value_pool);
  inputs.block_tables = pointer<const int64_t>(block_tables);
  inputs.prefix_lengths = pointer<const int64_t>(prefix_lengths);
  inputs.table_stride = table_stride;
  inputs.q_strides = strides(q_strides);
  inputs.k_strides = strides(k_strides);
  inputs.v_strides = strides(v_strides);
  inputs.key_pool_strides = pool_strides(key_pool_strides);
  inputs.value_pool_strides = pool_strides(value_pool_strides);
  return inputs;
}

// `run` behind the arguments of attention().
template <typename... Others>
auto with_attention(nabla_fast_status (*run)(const nabla_fast_attention&, Others...)) {
  return [run](std::uintptr_t q, const py::tuple& q_shape, const py::tuple& q_strides,
               std::uintptr_t k, const py::tuple& k_strides, std::uintptr_t v,
               const py::tuple& v_strides, std::uintptr_t key_pool, const py::tuple& pool_shape,
               const py::tuple& key_pool_strides, std::uintptr_t value_pool,
               const py::tuple& value_pool_strides, std::uintptr_t block_tables,
               int64_t table_width, int64_t table_stride, std::uintptr_t prefix_lengths,
               double scale, int64_t window, Others... others) {
    return run(attention(q, q_shape, q_strides, k, k_strides, v, v_strides, key_pool, pool_shape,
                         key_pool_strides, value_pool, value_pool_strides, block_tables,
                         table_width, table_stride, prefix_lengths, scale, window),
               others...);
  };
}

nabla_fast_status prefix_attention(const nabla_fast_attention& inputs, std::uintptr_t output,
                                   py::tuple output_strides, int32_t num_threads) {
  const nabla_fast_strides to = strides(output_strides);
  py::gil_scoped_release release;
  return nabla_fast_prefix_attention(&inputs, pointer<float>(output), to, num_threads);
}

nabla_fast_status prefix_attention_backward(const nabla_fast_attention& inputs,
                                            std::uintptr_t cotangent, py::tuple cotangent_strides,
                                            std::uintptr_t dq, py::tuple dq_strides,
                                            std::uintptr_t dk, py::tuple dk_strides,
                                            std::uintptr_t dv, py::tuple dv_strides,
                                            int32_t num_threads) {
  const nabla_fast_strides of_cotangent = strides(cotangent_strides), of_dq = strides(dq_strides),
                           of_dk = strides(dk_strides), of_dv = strides(dv_strides);
  py::gil_scoped_release release;
  const int64_t bytes = nabla_fast_prefix_attention_backward_workspace(&inputs, num_threads);
  const auto memory = workspace(bytes);
  return nabla_fast_prefix_attention_backward(
      &inputs, pointer<const float>(cotangent), of_cotangent, pointer<float>(dq), of_dq,
      pointer<float>(dk), of_dk, pointer<float>(dv), of_dv, memory.get(), bytes, num_threads);
}

void vec_exp(std::uintptr_t x, std::uintptr_t y, int64_t n) {
  nabla_fast::internal::vec_exp_array(pointer<const float>(x), pointer<float>(y), n);
}

nabla_fast_status lm_logits(std::uintptr_t hidden, int64_t rows, int64_t hidden_stride,
                            std::uintptr_t head, nabla_fast_dtype head_dtype, int64_t vocab,
                            int64_t width, int64_t head_stride, std::uintptr_t logits,
                            int64_t logits_stride, int32_t num_threads) {
  return nabla_fast_lm_logits(pointer<const float>(hidden), rows, hidden_stride,
                              pointer<const void>(head), head_dtype, vocab, width, head_stride,
                              pointer<float>(logits), logits_stride, num_threads);
}

nabla_fast_status nll_grad(std::uintptr_t hidden, int64_t rows, int64_t hidden_stride,
                           std::uintptr_t head, nabla_fast_dtype head_dtype, int64_t vocab,
                           int64_t width, int64_t head_stride, std::uintptr_t targets,
                           std::uintptr_t grad, std::uintptr_t row_status, std::uintptr_t workspace,
                           int64_t workspace_bytes, int32_t num_threads) {
  return nabla_fast_nll_grad(pointer<const float>(hidden), rows, hidden_stride,
                             pointer<const void>(head), head_dtype, vocab, width, head_stride,
                             pointer<const int64_t>(targets), pointer<float>(grad), width,
                             pointer<nabla_fast_status>(row_status), pointer<void>(workspace),
                             workspace_bytes, num_threads);
}

int64_t exponential_race(std::uintptr_t generator, int64_t vocab, std::uintptr_t tokens,
                         std::uintptr_t probabilities, bool wide, int64_t count) {
  auto* state = pointer<nabla_fast::internal::Mt19937>(generator);
  auto* ids = pointer<const int64_t>(tokens);
  if (wide)
    return nabla_fast::internal::exponential_race(state, vocab, ids,
                                                  pointer<const double>(probabilities), count);
  return nabla_fast::internal::exponential_race(state, vocab, ids,
                                                pointer<const float>(probabilities), count);
}

int64_t filter_tokens(std::uintptr_t logits, bool wide, int64_t vocab, double temperature,
                      int64_t top_k, double top_p, std::uintptr_t tokens,
                      std::uintptr_t probabilities, int64_t capacity) {
  auto* ids = pointer<int64_t>(tokens);
  if (wide)
    return nabla_fast::internal::filter_tokens(pointer<const double>(logits), vocab, temperature,
                                               top_k, top_p, ids, pointer<double>(probabilities),
                                               capacity);
  return nabla_fast::internal::filter_tokens(pointer<const float>(logits), vocab, temperature,
                                             top_k, top_p, ids, pointer<float>(probabilities),
                                             capacity);
}

}  // namespace

PYBIND11_MODULE(_C, module, py::mod_gil_not_used()) {
  using release_gil = py::call_guard<py::gil_scoped_release>;

  module.attr("FLOAT32") = static_cast<int>(NABLA_FAST_FLOAT32);
  module.attr("BFLOAT16") = static_cast<int>(NABLA_FAST_BFLOAT16);
  module.attr("BAD_ROWS") = static_cast<int>(NABLA_FAST_BAD_ROWS);
  module.def("abi_version", &nabla_fast_abi_version);
  module.def("status_string", &nabla_fast_status_string, py::arg("status"));
  module.def("cpu_isa", &nabla_fast_cpu_isa);
  module.def("limit_cpu_isa", &nabla_fast_limit_cpu_isa, py::arg("isa"));
  module.def("token_stats", &token_stats, release_gil(), py::arg("logits"), py::arg("dtype"),
             py::arg("rows"), py::arg("vocab"), py::arg("row_stride"), py::arg("tau"),
             py::arg("logsumexp"), py::arg("confidence"), py::arg("entropy"), py::arg("argmax"),
             py::arg("row_status"), py::arg("num_threads"),
             "nabla_fast_token_stats of nabla_fast.h; pointers are addresses. Returns a status.");
  module.def("dto_descent", &dto_descent, release_gil(), py::arg("z"), py::arg("grad"),
             py::arg("exp_avg"), py::arg("exp_avg_sq"), py::arg("step"), py::arg("rows"),
             py::arg("vocab"), py::arg("z_stride"), py::arg("grad_stride"),
             py::arg("exp_avg_stride"), py::arg("exp_avg_sq_stride"), py::arg("schedule"),
             py::arg("iters"), py::arg("schedule_stride"), py::arg("until"), py::arg("group"),
             py::arg("tau"), py::arg("noise_seed"), py::arg("noise_position"), py::arg("token"),
             py::arg("flipped"), py::arg("row_status"), py::arg("num_threads"),
             "nabla_fast_dto_descent of nabla_fast.h with a workspace of its own; pointers are "
             "addresses, 0 for null. Returns a status.");
  module.def(
      "prefix_attention", with_attention(&prefix_attention),
      "nabla_fast_prefix_attention of nabla_fast.h; tensors are addresses, sizes and strides. "
      "Returns a status.");
  module.def(
      "prefix_attention_backward", with_attention(&prefix_attention_backward),
      "nabla_fast_prefix_attention_backward of nabla_fast.h with a workspace of its own; tensors "
      "are addresses, sizes and strides. Returns a status.");
  module.def("vec_exp", &vec_exp, release_gil(), py::arg("x"), py::arg("y"), py::arg("n"),
             "y = exp(x) for n float32 at the addresses x and y, as kernels compute it.");
  module.def("lm_logits", &lm_logits, release_gil(), py::arg("hidden"), py::arg("rows"),
             py::arg("hidden_stride"), py::arg("head"), py::arg("head_dtype"), py::arg("vocab"),
             py::arg("width"), py::arg("head_stride"), py::arg("logits"), py::arg("logits_stride"),
             py::arg("num_threads"),
             "nabla_fast_lm_logits of nabla_fast.h; pointers are addresses. Returns a status.");
  module.def("nll_grad", &nll_grad, release_gil(), py::arg("hidden"), py::arg("rows"),
             py::arg("hidden_stride"), py::arg("head"), py::arg("head_dtype"), py::arg("vocab"),
             py::arg("width"), py::arg("head_stride"), py::arg("targets"), py::arg("grad"),
             py::arg("row_status"), py::arg("workspace"), py::arg("workspace_bytes"),
             py::arg("num_threads"),
             "nabla_fast_nll_grad of nabla_fast.h; pointers are addresses. Returns a status.");
  module.def("nll_grad_workspace", &nabla_fast_nll_grad_workspace, py::arg("rows"),
             py::arg("vocab"), py::arg("width"));
  module.def("exponential_race", &exponential_race, release_gil(), py::arg("generator"),
             py::arg("vocab"), py::arg("tokens"), py::arg("probabilities"), py::arg("wide"),
             py::arg("count"),
             "A draw as torch.multinomial makes it, from the generator's words at an address.");
  module.def("filter_tokens", &filter_tokens, release_gil(), py::arg("logits"), py::arg("wide"),
             py::arg("vocab"), py::arg("temperature"), py::arg("top_k"), py::arg("top_p"),
             py::arg("tokens"), py::arg("probabilities"), py::arg("capacity"),
             "Tokens left by temperature, top-k and top-p; how many, or -1 for too many ties.");
  nabla_fast::bindings::bind_decoder(module);
  nabla_fast::bindings::bind_latents(module);
  nabla_fast::bindings::bind_mix(module);
  nabla_fast::bindings::bind_machine(module);
  nabla_fast::bindings::bind_onehot(module);
}
