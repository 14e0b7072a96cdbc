// The decoder's pass for Python. Tensors come as addresses, whose memory the caller keeps alive.

#include "internal/decoder.h"

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstdint>
#include <vector>

#include "bindings.h"

namespace py = pybind11;

namespace nabla_fast::bindings {

using internal::Decoder;
using internal::DecoderLayer;
using internal::DecoderPass;
using internal::Linear;
using internal::WeightType;

namespace {

Linear linear(const py::handle& pair) {
  auto [weight, bias] = pair.cast<std::pair<std::uintptr_t, std::uintptr_t>>();
  return {pointer<const void>(weight), pointer<const float>(bias)};
}

DecoderLayer layer(const py::dict& fields) {
  auto address = [&](const char* name) {
    return pointer<const float>(fields[name].cast<std::uintptr_t>());
  };
  DecoderLayer result{};
  result.attention_norm = address("attention_norm");
  result.q = linear(fields["q"]);
  result.k = linear(fields["k"]);
  result.v = linear(fields["v"]);
  result.qk_norm = address("qk_norm");
  result.output = linear(fields["output"]);
  result.mlp_norm = address("mlp_norm");
  result.gate = linear(fields["gate"]);
  result.up = linear(fields["up"]);
  result.down = linear(fields["down"]);
  result.attention_eps = fields["attention_eps"].cast<float>();
  result.qk_eps = fields["qk_eps"].cast<float>();
  result.mlp_eps = fields["mlp_eps"].cast<float>();
  result.scale = fields["scale"].cast<double>();
  result.window = fields["window"].cast<int64_t>();
  return result;
}

Decoder decoder(int64_t width, int64_t heads, int64_t kv_heads, int64_t dim, int64_t inner,
                WeightType weights, std::uintptr_t norm, float eps,
                const std::vector<py::dict>& layers) {
  Decoder result{width, heads, kv_heads, dim, inner, weights, {}, pointer<const float>(norm), eps};
  for (const py::dict& fields : layers) result.layers.push_back(layer(fields));
  return result;
}

DecoderPass pass(int64_t batch, int64_t suffix, std::uintptr_t x, std::uintptr_t cos,
                 std::uintptr_t sin, std::uintptr_t key_pool, std::uintptr_t value_pool,
                 int64_t blocks, int64_t block_size, std::uintptr_t block_tables,
                 int64_t table_width, std::uintptr_t prefix_lengths, std::uintptr_t slots,
                 std::uintptr_t memory, bool keep, std::uintptr_t states, int32_t num_threads) {
  return {batch,
          suffix,
          pointer<float>(x),
          pointer<const float>(cos),
          pointer<const float>(sin),
          pointer<float>(key_pool),
          pointer<float>(value_pool),
          blocks,
          block_size,
          pointer<const int64_t>(block_tables),
          table_width,
          pointer<const int64_t>(prefix_lengths),
          pointer<const int64_t>(slots),
          pointer<float>(memory),
          keep,
          pointer<float>(states),
          num_threads};
}

}  // namespace

void bind_decoder(py::module_& module) {
  using release_gil = py::call_guard<py::gil_scoped_release>;
  py::enum_<WeightType>(module, "WeightType")
      .value("FLOAT32", WeightType::kFloat32)
      .value("BFLOAT16", WeightType::kBfloat16)
      .value("FLOAT16", WeightType::kFloat16);
  py::class_<DecoderPass>(module, "DecoderPass").def(py::init(&pass));
  py::class_<Decoder>(module, "Decoder")
      .def(py::init(&decoder))
      .def("memory", &internal::decoder_memory, py::arg("tokens"), py::arg("keep"))
      .def("forward", &internal::decoder_forward, release_gil())
      .def(
          "backward_norm",
          [](const Decoder& self, const DecoderPass& p, std::uintptr_t dx) {
            internal::decoder_backward_norm(self, p, pointer<float>(dx));
          },
          release_gil())
      .def(
          "backward_mlp",
          [](const Decoder& self, const DecoderPass& p, int64_t layer, std::uintptr_t dx,
             std::uintptr_t d_attended) {
            internal::decoder_backward_mlp(self, p, layer, pointer<float>(dx),
                                           pointer<float>(d_attended));
          },
          release_gil())
      .def(
          "backward_qkv",
          [](const Decoder& self, const DecoderPass& p, int64_t layer, std::uintptr_t d_qkv,
             std::uintptr_t dx) {
            internal::decoder_backward_qkv(self, p, layer, pointer<float>(d_qkv),
                                           pointer<float>(dx));
          },
          release_gil())
      .def("qkv_offset", [](const Decoder& self, const DecoderPass& p, int64_t layer) {
        return internal::decoder_qkv(self, p, layer) - p.memory;
      });
}

}  // namespace nabla_fast::bindings
