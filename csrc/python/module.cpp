// nabla_fast._C: the C interface for Python, and what the package's own files need of the kernels,
// without torch.

#include <pybind11/pybind11.h>

#include <cstdint>

#include "bindings.h"
#include "internal/vec_exp_array.h"
#include "nabla_fast.h"
#include "pages.h"

namespace py = pybind11;

namespace nabla_fast::bindings {
namespace {

void vec_exp(std::uintptr_t x, std::uintptr_t y, int64_t n) {
  internal::vec_exp_array(pointer<const float>(x), pointer<float>(y), n);
}

}  // namespace

PYBIND11_MODULE(_C, module, py::mod_gil_not_used()) {
  module.def("abi_version", &nabla_fast_abi_version);
  module.def("status_string", &nabla_fast_status_string, py::arg("status"));
  module.def("cpu_isa", &nabla_fast_cpu_isa);
  module.def("limit_cpu_isa", &nabla_fast_limit_cpu_isa, py::arg("isa"));
  module.def("vec_exp", &vec_exp, py::call_guard<py::gil_scoped_release>(), py::arg("x"),
             py::arg("y"), py::arg("n"),
             "y = exp(x) for n float32 at the addresses x and y, as kernels compute it.");
  module.def(
      "advise_large_pages",
      [](std::uintptr_t address, int64_t bytes) {
        advise_large_pages(pointer<void>(address), bytes);
      },
      py::arg("address"), py::arg("bytes"), "Asks for large pages in memory that is new.");
  bind_functions(module);
  bind_decoder(module);
  bind_machine(module);
  bind_sampling(module);
}

}  // namespace nabla_fast::bindings
