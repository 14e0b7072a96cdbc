// The descent on latents for Python. Tensors come as addresses, whose memory the caller keeps alive.

#include <pybind11/pybind11.h>

#include <cstdint>

#include "bindings.h"
#include "nabla_fast.h"

namespace py = pybind11;

namespace nabla_fast::bindings {
namespace {

nabla_fast_status dto_descent_latents(
    std::uintptr_t h, std::uintptr_t head, nabla_fast_dtype head_dtype, std::uintptr_t grad,
    std::uintptr_t exp_avg, std::uintptr_t exp_avg_sq, std::uintptr_t step, int64_t rows,
    int64_t vocab, int64_t width, int64_t h_stride, int64_t head_stride, int64_t grad_stride,
    int64_t exp_avg_stride, int64_t exp_avg_sq_stride, std::uintptr_t schedule, int64_t iters,
    int64_t schedule_stride, std::uintptr_t until, std::uintptr_t group, double tau,
    std::uintptr_t noise_seed, std::uintptr_t noise_position, std::uintptr_t token,
    std::uintptr_t flipped, std::uintptr_t row_status, std::uintptr_t workspace,
    int64_t workspace_bytes, int32_t num_threads) {
  return nabla_fast_dto_descent_latents(
      pointer<float>(h), pointer<const void>(head), head_dtype, pointer<const float>(grad),
      pointer<float>(exp_avg), pointer<float>(exp_avg_sq), pointer<int64_t>(step), rows, vocab,
      width, h_stride, head_stride, grad_stride, exp_avg_stride, exp_avg_sq_stride,
      pointer<const double>(schedule), iters, schedule_stride, pointer<const int64_t>(until),
      pointer<const int64_t>(group), tau, pointer<const int64_t>(noise_seed),
      pointer<const int64_t>(noise_position), pointer<int64_t>(token), pointer<uint8_t>(flipped),
      pointer<nabla_fast_status>(row_status), pointer<void>(workspace), workspace_bytes,
      num_threads);
}

}  // namespace

void bind_latents(py::module_& module) {
  module.def(
      "dto_descent_latents", &dto_descent_latents, py::call_guard<py::gil_scoped_release>(),
      py::arg("h"), py::arg("head"), py::arg("head_dtype"), py::arg("grad"), py::arg("exp_avg"),
      py::arg("exp_avg_sq"), py::arg("step"), py::arg("rows"), py::arg("vocab"), py::arg("width"),
      py::arg("h_stride"), py::arg("head_stride"), py::arg("grad_stride"),
      py::arg("exp_avg_stride"), py::arg("exp_avg_sq_stride"), py::arg("schedule"),
      py::arg("iters"), py::arg("schedule_stride"), py::arg("until"), py::arg("group"),
      py::arg("tau"), py::arg("noise_seed"), py::arg("noise_position"), py::arg("token"),
      py::arg("flipped"), py::arg("row_status"), py::arg("workspace"), py::arg("workspace_bytes"),
      py::arg("num_threads"),
      "nabla_fast_dto_descent_latents of nabla_fast.h; pointers are addresses, 0 for null. Returns "
      "a status.");
  module.def("dto_descent_latents_workspace", &nabla_fast_dto_descent_latents_workspace,
             py::arg("rows"), py::arg("vocab"), py::arg("width"));
}

}  // namespace nabla_fast::bindings
