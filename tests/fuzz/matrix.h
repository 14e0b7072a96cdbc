// Matrices whose dtype is drawn.
#ifndef NABLA_FAST_FUZZ_MATRIX_H_
#define NABLA_FAST_FUZZ_MATRIX_H_

#include <memory>
#include <vector>

#include "fuzz.h"

namespace fuzz {

// A matrix of either dtype.
class Matrix {
 public:
  Matrix(Random& random, int64_t rows, int64_t width, nabla_fast_dtype dtype) : dtype_(dtype) {
    if (dtype == NABLA_FAST_FLOAT32)
      floats_ = std::make_unique<Tensor<float>>(random, std::vector<int64_t>{rows}, width);
    else
      halves_ = std::make_unique<Tensor<uint16_t>>(random, std::vector<int64_t>{rows}, width);
  }
  // work(tensor) with the tensor of the dtype it has.
  template <typename Work>
  auto with(const Work& work) {
    return floats_ ? work(*floats_) : work(*halves_);
  }
  nabla_fast_table table() {
    return with([&](auto& tensor) -> nabla_fast_table {
      return {tensor.data(), dtype_, tensor.columns(), tensor.stride(0)};
    });
  }
  const void* row(int64_t r) {
    return with([&](auto& tensor) -> const void* { return tensor.row(r); });
  }
  bool untouched() {
    return with([](auto& tensor) { return tensor.untouched(); });
  }
  void plain(Values& values) {
    with([&](auto& tensor) {
      tensor.each_row([&](auto* row) { values.fill_plain(row, tensor.columns()); });
    });
  }
  void logits(Values& values) {
    with([&](auto& tensor) {
      tensor.each_row([&](auto* row) { values.fill_logits(row, tensor.columns()); });
    });
  }
  nabla_fast_status status(int64_t r) {
    return with([&](auto& tensor) { return status_of(tensor.row(r), tensor.columns()); });
  }

 private:
  nabla_fast_dtype dtype_;
  std::unique_ptr<Tensor<float>> floats_;
  std::unique_ptr<Tensor<uint16_t>> halves_;
};

inline nabla_fast_dtype dtype(Random& random) {
  return random.pick<nabla_fast_dtype>({NABLA_FAST_FLOAT32, NABLA_FAST_BFLOAT16});
}

}  // namespace fuzz

#endif  // NABLA_FAST_FUZZ_MATRIX_H_
