// The machine's limits for Python: what the kernel benchmark holds times against.

#include "internal/machine.h"

#include <pybind11/pybind11.h>

#include <cstdint>

#include "bindings.h"

namespace py = pybind11;

namespace nabla_fast::bindings {

void bind_machine(py::module_& module) {
  using release_gil = py::call_guard<py::gil_scoped_release>;
  module.def(
      "machine_read",
      [](std::uintptr_t x, int64_t n, int threads) {
        return internal::machine_read(pointer<const float>(x), n, threads);
      },
      release_gil(), py::arg("x"), py::arg("n"), py::arg("threads"),
      "The sum of n float32 at the address x.");
  module.def(
      "machine_triad",
      [](std::uintptr_t a, std::uintptr_t b, std::uintptr_t c, float s, int64_t n, int threads) {
        internal::machine_triad(pointer<float>(a), pointer<const float>(b), pointer<const float>(c),
                                s, n, threads);
      },
      release_gil(), py::arg("a"), py::arg("b"), py::arg("c"), py::arg("s"), py::arg("n"),
      py::arg("threads"), "a = b + s c for n float32 at addresses that are multiples of 64.");
  module.def("machine_multiply_adds", &internal::machine_multiply_adds, release_gil(),
             py::arg("rounds"), py::arg("threads"),
             "Operations of rounds of float32 multiply-adds in each thread.");
  module.def(
      "machine_dot_products", &internal::machine_dot_products, release_gil(), py::arg("rounds"),
      py::arg("threads"),
      "Operations of rounds of bf16 dot products in each thread; 0 without the instruction.");
  module.def(
      "machine_tile_products", &internal::machine_tile_products, release_gil(), py::arg("rounds"),
      py::arg("threads"),
      "Operations of rounds of bf16 products of tiles in each thread; 0 without a matrix unit.");
}

}  // namespace nabla_fast::bindings
