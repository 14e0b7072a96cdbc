// Kernels over hidden states, cotangents and their tables for Python. Tensors come as addresses,
// whose memory the caller keeps alive; matrices as tuples (address, dtype, width, stride).

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstdint>
#include <tuple>
#include <vector>

#include "bindings.h"
#include "nabla_fast.h"

namespace py = pybind11;

namespace nabla_fast::bindings {
namespace {

using Matrix = std::tuple<std::uintptr_t, nabla_fast_dtype, int64_t, int64_t>;

nabla_fast_table table(const Matrix& matrix) {
  const auto [address, dtype, width, stride] = matrix;
  return {pointer<const void>(address), dtype, width, stride};
}

class Onehot {
 public:
  Onehot(int64_t rows, int64_t vocab, const std::vector<Matrix>& cotangents,
         const std::vector<Matrix>& tables, const Matrix& hidden, const Matrix& head,
         double nll_coeff, const std::vector<std::uintptr_t>& token_maps,
         const std::vector<int64_t>& table_rows)
      : table_rows_(table_rows) {
    if (cotangents.size() != tables.size())
      throw py::value_error("one cotangent a table is needed");
    if (token_maps.size() != table_rows.size() ||
        (!token_maps.empty() && token_maps.size() != tables.size()))
      throw py::value_error("one map and one number of rows a table is needed, or none");
    for (const Matrix& matrix : cotangents) cotangents_.push_back(table(matrix));
    for (const Matrix& matrix : tables) tables_.push_back(table(matrix));
    inputs_ = {rows,        vocab,     static_cast<int64_t>(tables_.size()),
               nullptr,     nullptr,   table(hidden),
               table(head), nll_coeff, nullptr,
               nullptr};
    for (const std::uintptr_t address : token_maps)
      token_maps_.push_back(pointer<const int64_t>(address));
  }
  nabla_fast_onehot inputs() const {
    nabla_fast_onehot inputs = inputs_;
    inputs.cotangents = cotangents_.data();
    inputs.tables = tables_.data();
    if (!token_maps_.empty()) {
      inputs.token_maps = token_maps_.data();
      inputs.table_rows = table_rows_.data();
    }
    return inputs;
  }

 private:
  std::vector<nabla_fast_table> cotangents_, tables_;
  std::vector<const int64_t*> token_maps_;
  std::vector<int64_t> table_rows_;
  nabla_fast_onehot inputs_;
};

int64_t onehot_grad_workspace(const Onehot& onehot) {
  const nabla_fast_onehot inputs = onehot.inputs();
  return nabla_fast_onehot_grad_workspace(&inputs);
}

nabla_fast_status onehot_grad(const Onehot& onehot, std::uintptr_t grad, int64_t grad_stride,
                              std::uintptr_t row_status, std::uintptr_t workspace,
                              int64_t workspace_bytes, int32_t num_threads) {
  const nabla_fast_onehot inputs = onehot.inputs();
  return nabla_fast_onehot_grad(&inputs, pointer<float>(grad), grad_stride,
                                pointer<nabla_fast_status>(row_status), pointer<void>(workspace),
                                workspace_bytes, num_threads);
}

int64_t onehot_grad_norm_workspace(const Onehot& onehot) {
  const nabla_fast_onehot inputs = onehot.inputs();
  return nabla_fast_onehot_grad_norm_workspace(&inputs);
}

nabla_fast_status onehot_grad_norm(const Onehot& onehot, std::uintptr_t norm,
                                   std::uintptr_t row_status, std::uintptr_t workspace,
                                   int64_t workspace_bytes, int32_t num_threads) {
  const nabla_fast_onehot inputs = onehot.inputs();
  return nabla_fast_onehot_grad_norm(&inputs, pointer<float>(norm),
                                     pointer<nabla_fast_status>(row_status),
                                     pointer<void>(workspace), workspace_bytes, num_threads);
}

int64_t linear_token_stats_workspace(const Matrix& hidden, int64_t rows, const Matrix& head,
                                     int64_t vocab) {
  const nabla_fast_table h = table(hidden), w = table(head);
  return nabla_fast_linear_token_stats_workspace(&h, rows, &w, vocab);
}

nabla_fast_status linear_token_stats(const Matrix& hidden, int64_t rows, const Matrix& head,
                                     int64_t vocab, double tau, std::uintptr_t logsumexp,
                                     std::uintptr_t confidence, std::uintptr_t entropy,
                                     std::uintptr_t argmax, std::uintptr_t row_status,
                                     std::uintptr_t workspace, int64_t workspace_bytes,
                                     int32_t num_threads) {
  const nabla_fast_table h = table(hidden), w = table(head);
  return nabla_fast_linear_token_stats(
      &h, rows, &w, vocab, tau, pointer<float>(logsumexp), pointer<float>(confidence),
      pointer<float>(entropy), pointer<int64_t>(argmax), pointer<nabla_fast_status>(row_status),
      pointer<void>(workspace), workspace_bytes, num_threads);
}

}  // namespace

void bind_onehot(py::module_& module) {
  using release_gil = py::call_guard<py::gil_scoped_release>;
  py::class_<Onehot>(module, "Onehot", "nabla_fast_onehot of nabla_fast.h.")
      .def(py::init<int64_t, int64_t, const std::vector<Matrix>&, const std::vector<Matrix>&,
                    const Matrix&, const Matrix&, double, const std::vector<std::uintptr_t>&,
                    const std::vector<int64_t>&>(),
           py::arg("rows"), py::arg("vocab"), py::arg("cotangents"), py::arg("tables"),
           py::arg("hidden"), py::arg("head"), py::arg("nll_coeff"), py::arg("token_maps"),
           py::arg("table_rows"));
  module.def("onehot_grad", &onehot_grad, release_gil(), py::arg("inputs"), py::arg("grad"),
             py::arg("grad_stride"), py::arg("row_status"), py::arg("workspace"),
             py::arg("workspace_bytes"), py::arg("num_threads"),
             "nabla_fast_onehot_grad of nabla_fast.h; pointers are addresses. Returns a status.");
  module.def("onehot_grad_workspace", &onehot_grad_workspace, py::arg("inputs"));
  module.def("onehot_grad_norm", &onehot_grad_norm, release_gil(), py::arg("inputs"),
             py::arg("norm"), py::arg("row_status"), py::arg("workspace"),
             py::arg("workspace_bytes"), py::arg("num_threads"),
             "nabla_fast_onehot_grad_norm of nabla_fast.h; pointers are addresses. Returns a "
             "status.");
  module.def("onehot_grad_norm_workspace", &onehot_grad_norm_workspace, py::arg("inputs"));
  module.def("linear_token_stats", &linear_token_stats, release_gil(), py::arg("hidden"),
             py::arg("rows"), py::arg("head"), py::arg("vocab"), py::arg("tau"),
             py::arg("logsumexp"), py::arg("confidence"), py::arg("entropy"), py::arg("argmax"),
             py::arg("row_status"), py::arg("workspace"), py::arg("workspace_bytes"),
             py::arg("num_threads"),
             "nabla_fast_linear_token_stats of nabla_fast.h; pointers are addresses, matrices "
             "tuples (address, dtype, width, stride). Returns a status.");
  module.def("linear_token_stats_workspace", &linear_token_stats_workspace, py::arg("hidden"),
             py::arg("rows"), py::arg("head"), py::arg("vocab"));
}

}  // namespace nabla_fast::bindings
