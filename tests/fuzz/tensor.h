// Tensors of a call, in memory of their own.
//
// Memory is allocated to the byte (bytes.h), and what lies between the rows of a tensor is poisoned for
// AddressSanitizer.
#ifndef NABLA_FAST_FUZZ_TENSOR_H_
#define NABLA_FAST_FUZZ_TENSOR_H_

#include <algorithm>
#include <memory>
#include <numeric>
#include <utility>
#include <vector>

#include "bytes.h"

#ifdef __SANITIZE_ADDRESS__
  #include <sanitizer/asan_interface.h>
#else
  #define ASAN_POISON_MEMORY_REGION(address, bytes) (static_cast<void>(0))
  #define ASAN_UNPOISON_MEMORY_REGION(address, bytes) (static_cast<void>(0))
#endif

namespace fuzz {

// Bytes anywhere, filled with one byte.
class Workspace {
 public:
  Workspace(Random& random, int64_t bytes, int fill)
      : shift_(static_cast<size_t>(random.between(0, 5))),
        base_(random, shift_ + static_cast<size_t>(bytes)) {
    std::fill(base_.begin(), base_.end(), static_cast<char>(fill));
  }
  char* data() { return base_.data() + shift_; }

 private:
  size_t shift_;
  Bytes base_;
};

// Where the rows of a tensor lie: outer axes of any stride, and elements side by side.
struct View {
  struct Axis {
    int64_t count, stride;
  };
  uintptr_t first;
  std::vector<Axis> axes;
  int64_t columns, element_bytes;

  int64_t rows() const {
    int64_t product = 1;
    for (const Axis& axis : axes) product *= axis.count;
    return product;
  }
  int64_t row_bytes() const { return columns * element_bytes; }
  int64_t bytes() const { return rows() * row_bytes(); }
  // work(address) of every row, the last axis first.
  template <typename Work>
  void each_row(const Work& work) const {
    std::vector<int64_t> index(axes.size(), 0);
    // Rows of no elements may be any distance apart.
    for (int64_t left = columns > 0 ? rows() : 0; left > 0; --left) {
      int64_t at = 0;
      for (size_t n = 0; n < axes.size(); ++n)
        if (index[n] > 0) at += index[n] * axes[n].stride;
      work(first + static_cast<uintptr_t>(at * element_bytes));
      for (size_t n = axes.size(); n-- > 0 && ++index[n] == axes[n].count;) index[n] = 0;
    }
  }
  // The elements of all rows, one behind the other.
  std::vector<char> elements() const {
    std::vector<char> all;
    all.reserve(static_cast<size_t>(bytes()));
    each_row([&](uintptr_t row) {
      const auto* from = reinterpret_cast<const char*>(row);
      all.insert(all.end(), from, from + row_bytes());
    });
    return all;
  }
  // Puts back what elements() gave.
  void put(const std::vector<char>& all) const {
    const char* from = all.data();
    if (!all.empty())
      each_row([&](uintptr_t row) {
        std::copy(from, from + row_bytes(), reinterpret_cast<char*>(row));
        from += row_bytes();
      });
  }
};

// A tensor of any elements, with up to three outer axes in any order in memory and strides that may be
// negative. Its bytes are random.
class AnyTensor {
 public:
  AnyTensor(Random& random, const std::vector<int64_t>& sizes, int64_t columns, size_t bytes,
            bool floats)
      : floats_(floats) {
    view_.columns = columns;
    view_.element_bytes = static_cast<int64_t>(bytes);
    for (const int64_t size : sizes) view_.axes.push_back({size, 0});
    std::vector<size_t> order(sizes.size());
    std::iota(order.begin(), order.end(), size_t{0});
    for (size_t n = order.size(); n > 1; --n)
      std::swap(order[n - 1],
                order[static_cast<size_t>(random.between(0, static_cast<int64_t>(n) - 1))]);
    int64_t stride = columns + random.pick<int64_t>({0, 0, 1, 3, 16, 61});
    int64_t span = columns, first = 0;
    for (const size_t n : order) {
      View::Axis& axis = view_.axes[n];
      axis.stride = random.one_in(6) ? -stride : stride;
      const int64_t extent = stride * std::max<int64_t>(axis.count - 1, 0);
      span += extent;
      if (axis.stride < 0) first += extent;
      stride *= std::max<int64_t>(axis.count, 1);
      // Nothing lies a stride away from the only one: any number will do.
      if (axis.count <= 1 && random.one_in(3))
        axis.stride = random.one_in(2) ? random.huge() : random.negative();
    }
    if (view_.bytes() == 0) {
      span = first = 0;
      if (random.one_in(3))
        for (View::Axis& axis : view_.axes)
          axis.stride = random.one_in(2) ? random.huge() : random.negative();
    }
    const size_t shift = static_cast<size_t>(random.pick<int64_t>({0, 0, 1, 3})) * bytes;
    memory_ = std::make_unique<Bytes>(random, shift + static_cast<size_t>(span) * bytes);
    std::fill(memory_->begin(), memory_->end(), static_cast<char>(random.next()));
    view_.first = reinterpret_cast<uintptr_t>(memory_->data() + shift) +
                  static_cast<uintptr_t>(first) * bytes;
    seal();
  }
  AnyTensor(const AnyTensor&) = delete;
  AnyTensor& operator=(const AnyTensor&) = delete;
  ~AnyTensor() { unpoison(); }

  const View& view() const { return view_; }
  bool floats() const { return floats_; }
  int64_t stride(size_t axis) const { return view_.axes[axis].stride; }
  int64_t columns() const { return view_.columns; }

  // Whether not a byte has changed since the constructor, each_row() or seal().
  bool untouched() {
    unpoison();
    const bool same = std::equal(memory_->begin(), memory_->end(), before_.begin());
    poison();
    return same;
  }
  void seal() {
    unpoison();
    before_.assign(memory_->begin(), memory_->end());
    poison();
  }

 protected:
  void unpoison() { ASAN_UNPOISON_MEMORY_REGION(memory_->data(), memory_->size()); }
  void poison() {
    ASAN_POISON_MEMORY_REGION(memory_->data(), memory_->size());
    view_.each_row([&]([[maybe_unused]] uintptr_t row) {
      ASAN_UNPOISON_MEMORY_REGION(reinterpret_cast<void*>(row),
                                  static_cast<size_t>(view_.row_bytes()));
    });
  }

 private:
  View view_;
  bool floats_;
  std::unique_ptr<Bytes> memory_;
  std::vector<char> before_;
};

template <typename T>
class Tensor : public AnyTensor {
 public:
  Tensor(Random& random, const std::vector<int64_t>& sizes, int64_t columns)
      : AnyTensor(random, sizes, columns, sizeof(T), std::is_same_v<T, float>) {}

  T* data() { return reinterpret_cast<T*>(view().first); }
  T* row(std::initializer_list<int64_t> index) {
    if (columns() == 0) return data();
    int64_t at = 0;
    size_t axis = 0;
    for (const int64_t n : index) at += n > 0 ? n * stride(axis) : 0, ++axis;
    return data() + at;
  }
  T* row(int64_t n) { return row({n}); }
  // Of a tensor that is a row.
  T& operator[](int64_t n) { return data()[n]; }

  // fill(row) of every row, and what is between them becomes poison.
  template <typename Fill>
  void each_row(const Fill& fill) {
    view().each_row([&](uintptr_t row) { fill(reinterpret_cast<T*>(row)); });
    seal();
  }
  // elements() of a tensor like this one.
  static const T* of(const std::vector<char>& elements) {
    return reinterpret_cast<const T*>(elements.data());
  }
};

// A row of elements.
template <typename T>
class List : public Tensor<T> {
 public:
  List(Random& random, int64_t count) : Tensor<T>(random, {}, count) {}
};

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
  AnyTensor& tensor() {
    return floats_ ? static_cast<AnyTensor&>(*floats_) : static_cast<AnyTensor&>(*halves_);
  }
  nabla_fast_dtype dtype() const { return dtype_; }
  const void* row(int64_t r) {
    return with([&](auto& tensor) -> const void* { return tensor.row(r); });
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
  // Of a row of logits with an answer.
  int64_t best(int64_t r) {
    return with([&](auto& tensor) { return argmax(tensor.row(r), tensor.columns()); });
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

#endif  // NABLA_FAST_FUZZ_TENSOR_H_
