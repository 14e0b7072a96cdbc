// The mixes for Python: matrices are tuples (address, dtype, width, stride).

#include <pybind11/pybind11.h>

#include <cstdint>
#include <memory>
#include <vector>

#include "bindings.h"
#include "nabla_fast.h"

namespace py = pybind11;

namespace nabla_fast::bindings {
namespace {

nabla_fast_table matrix(const py::tuple& of) {
  return {pointer<const void>(of[0].cast<std::uintptr_t>()), of[1].cast<nabla_fast_dtype>(),
          of[2].cast<int64_t>(), of[3].cast<int64_t>()};
}

std::vector<nabla_fast_table> matrices(const py::sequence& of) {
  std::vector<nabla_fast_table> all;
  for (const auto& one : of) all.push_back(matrix(py::reinterpret_borrow<py::tuple>(one)));
  return all;
}

// The inputs of a call, and the tables they point at.
struct Mix {
  std::vector<nabla_fast_table> tables;
  nabla_fast_mix inputs{};

  Mix(int64_t rows, int64_t vocab, const py::object& logits, const py::object& hidden,
      const py::object& head, double tau, std::uintptr_t noise_seed, std::uintptr_t noise_position,
      const py::sequence& of)
      : tables(matrices(of)) {
    inputs.rows = rows;
    inputs.vocab = vocab;
    if (!logits.is_none()) inputs.logits = matrix(logits);
    if (!hidden.is_none()) inputs.hidden = matrix(hidden);
    if (!head.is_none()) inputs.head = matrix(head);
    inputs.tau = tau;
    inputs.noise_seed = pointer<const int64_t>(noise_seed);
    inputs.noise_position = pointer<const int64_t>(noise_position);
    inputs.table_count = static_cast<int64_t>(tables.size());
    inputs.tables = tables.data();
  }
};

std::unique_ptr<char[]> workspace(int64_t bytes) {
  return std::unique_ptr<char[]>(new char[static_cast<size_t>(bytes)]);
}

nabla_fast_status forward(const Mix& mix, bool hard, const py::sequence& mixes,
                          std::uintptr_t row_status, int32_t num_threads) {
  std::vector<float*> outputs;
  for (const auto& one : mixes) outputs.push_back(pointer<float>(one.cast<std::uintptr_t>()));
  const py::gil_scoped_release release;
  const int64_t bytes = nabla_fast_embedding_mix_workspace(&mix.inputs, hard, num_threads);
  const auto memory = workspace(bytes);
  return nabla_fast_embedding_mix(&mix.inputs, hard, outputs.data(),
                                  pointer<nabla_fast_status>(row_status), memory.get(), bytes,
                                  num_threads);
}

nabla_fast_status backward(const Mix& mix, const py::sequence& cotangents, const py::object& direct,
                           std::uintptr_t grad, int64_t grad_stride, std::uintptr_t row_status,
                           int32_t num_threads) {
  const std::vector<nabla_fast_table> of_mixes = matrices(cotangents);
  nabla_fast_table of_onehot{};
  if (!direct.is_none()) of_onehot = matrix(direct);
  const py::gil_scoped_release release;
  const int64_t bytes =
      nabla_fast_embedding_mix_backward_workspace(&mix.inputs, of_mixes.data(), num_threads);
  const auto memory = workspace(bytes);
  return nabla_fast_embedding_mix_backward(
      &mix.inputs, of_mixes.data(), &of_onehot, pointer<void>(grad), grad_stride,
      pointer<nabla_fast_status>(row_status), memory.get(), bytes, num_threads);
}

}  // namespace

void bind_mix(py::module_& module) {
  py::class_<Mix>(module, "Mix", "nabla_fast_mix of nabla_fast.h; tensors outlive it.")
      .def(py::init<int64_t, int64_t, py::object, py::object, py::object, double, std::uintptr_t,
                    std::uintptr_t, py::sequence>(),
           py::kw_only(), py::arg("rows"), py::arg("vocab"), py::arg("logits"), py::arg("hidden"),
           py::arg("head"), py::arg("tau"), py::arg("noise_seed"), py::arg("noise_position"),
           py::arg("tables"))
      .def("forward", &forward, py::arg("hard"), py::arg("mixes"), py::arg("row_status"),
           py::arg("num_threads"),
           "nabla_fast_embedding_mix with a workspace of its own. Returns a status.")
      .def("backward", &backward, py::arg("cotangents"), py::arg("direct"), py::arg("grad"),
           py::arg("grad_stride"), py::arg("row_status"), py::arg("num_threads"),
           "nabla_fast_embedding_mix_backward with a workspace of its own. Returns a status.");
}

}  // namespace nabla_fast::bindings
