// What the files of the Python module share.
#ifndef NABLA_FAST_PYTHON_BINDINGS_H_
#define NABLA_FAST_PYTHON_BINDINGS_H_

#include <pybind11/pybind11.h>

#include <cstdint>

namespace nabla_fast::bindings {

template <typename T>
T* pointer(std::uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

void bind_functions(pybind11::module_& module);
void bind_decoder(pybind11::module_& module);
void bind_machine(pybind11::module_& module);
void bind_sampling(pybind11::module_& module);

}  // namespace nabla_fast::bindings

#endif  // NABLA_FAST_PYTHON_BINDINGS_H_
