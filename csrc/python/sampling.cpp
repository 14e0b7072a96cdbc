// Steps of a sampler for Python. Tensors come as addresses, whose memory the caller keeps alive.

#include <pybind11/pybind11.h>

#include <cstdint>

#include "bindings.h"
#include "internal/exponential_race.h"
#include "internal/token_filter.h"

namespace py = pybind11;

namespace nabla_fast::bindings {
namespace {

int64_t exponential_race(std::uintptr_t generator, int64_t vocab, std::uintptr_t tokens,
                         std::uintptr_t probabilities, bool wide, int64_t count) {
  auto* state = pointer<internal::Mt19937>(generator);
  auto* ids = pointer<const int64_t>(tokens);
  if (wide)
    return internal::exponential_race(state, vocab, ids, pointer<const double>(probabilities),
                                      count);
  return internal::exponential_race(state, vocab, ids, pointer<const float>(probabilities), count);
}

int64_t filter_tokens(std::uintptr_t logits, bool wide, int64_t vocab, double temperature,
                      int64_t top_k, double top_p, std::uintptr_t tokens,
                      std::uintptr_t probabilities, int64_t capacity) {
  auto* ids = pointer<int64_t>(tokens);
  if (wide)
    return internal::filter_tokens(pointer<const double>(logits), vocab, temperature, top_k, top_p,
                                   ids, pointer<double>(probabilities), capacity);
  return internal::filter_tokens(pointer<const float>(logits), vocab, temperature, top_k, top_p,
                                 ids, pointer<float>(probabilities), capacity);
}

}  // namespace

void bind_sampling(py::module_& module) {
  using release_gil = py::call_guard<py::gil_scoped_release>;
  module.def("exponential_race", &exponential_race, release_gil(), py::arg("generator"),
             py::arg("vocab"), py::arg("tokens"), py::arg("probabilities"), py::arg("wide"),
             py::arg("count"),
             "A draw as torch.multinomial makes it, from the generator's words at an address.");
  module.def("filter_tokens", &filter_tokens, release_gil(), py::arg("logits"), py::arg("wide"),
             py::arg("vocab"), py::arg("temperature"), py::arg("top_k"), py::arg("top_p"),
             py::arg("tokens"), py::arg("probabilities"), py::arg("capacity"),
             "Tokens left by temperature, top-k and top-p; how many, or -1 for too many ties.");
}

}  // namespace nabla_fast::bindings
