// Whether what a call writes overlaps itself or anything else that the call uses.
//
//   const bool overlap = any_overlap([&](auto& arrays) {
//     arrays.writes(array_of(call.grad, call.rows));  // those that are written come first
//     arrays.writes(array_of(call.row_status, call.rows));
//     arrays.reads(array_of(call.hidden, call.rows));
//   });
//
// Spans of bytes are compared first, which costs a few nanoseconds a pair. Only where they intersect
// are arrays searched for a common byte: columns of one matrix intersect without one.
#ifndef NABLA_FAST_CPU_BASE_OVERLAP_H_
#define NABLA_FAST_CPU_BASE_OVERLAP_H_

#include <cstdint>
#include <initializer_list>

#include "base/check.h"
#include "nabla_fast.h"

namespace nabla_fast {

// Elements of a tensor in memory, which fit (base/check.h): runs of bytes, and up to three axes
// that say how many there are and how many bytes apart. No bytes where there is no tensor.
struct Array {
  static constexpr int kMostAxes = 3;

  int64_t first, run;  // address and bytes of the first run
  int axis_count;      // axes of more than one run
  Axis axes[kMostAxes];
  int64_t low, high;  // the bytes lie in [low, high)

  Array() = default;
  // `columns` elements side by side, along axes whose strides are in elements.
  Array(const void* data, std::initializer_list<Axis> outer, int64_t columns, int64_t element_bytes)
      : run(0), axis_count(0) {
    if (!data || columns <= 0) return;
    int64_t below = 0, above = 0;
    for (const Axis& axis : outer) {
      if (axis.count <= 0) return;
      if (axis.count == 1) continue;
      const int64_t stride = axis.stride * element_bytes, reach = (axis.count - 1) * stride;
      (reach < 0 ? below : above) += reach;
      axes[axis_count++] = {axis.count, stride};
    }
    first = static_cast<int64_t>(reinterpret_cast<uintptr_t>(data));
    run = columns * element_bytes;
    low = moved(first, below);
    high = moved(first, above + run);
  }

  bool empty() const { return run == 0; }

  // An address, which may be any number.
  static int64_t moved(int64_t address, int64_t bytes) {
    return static_cast<int64_t>(static_cast<uint64_t>(address) + static_cast<uint64_t>(bytes));
  }
};

template <typename T>
Array array_of(const T* data, int64_t count) {
  return {data, {}, count, sizeof(T)};
}

inline Array array_of_bytes(const void* data, int64_t bytes) { return {data, {}, bytes, 1}; }

inline Array array_of(const nabla_fast_matrix& matrix, int64_t rows) {
  return {matrix.data, {{rows, matrix.stride}}, matrix.width, bytes_of(matrix.dtype)};
}

inline Array array_of(const nabla_fast_output& matrix, int64_t rows) {
  return {matrix.data, {{rows, matrix.stride}}, matrix.width, bytes_of(matrix.dtype)};
}

// True if two arrays have a byte in common; if two elements of an array do.
bool have_common_byte(const Array& a, const Array& b);
bool overlaps_itself(const Array& array);

// Arrays of a call, those that are written first: some of these are kept, and every later array is
// compared with them.
class Arrays {
 public:
  // Keeps written arrays from number `first` on.
  explicit Arrays(int64_t first) : first_(first) {}

  void writes(const Array& array) {
    const int64_t number = written_++;
    if (number < first_ || array.empty()) return;
    compare(array);
    if (number >= first_ + kMost) return;
    overlap_ = overlap_ || (array.axis_count > 0 && overlaps_itself(array));
    kept_[count_++] = array;
  }
  void reads(const Array& array) {
    if (!array.empty()) compare(array);
  }

  bool overlap() const { return overlap_; }
  // First written array that none of the passes so far has kept, or -1.
  int64_t next() const { return written_ > first_ + kMost ? first_ + kMost : -1; }

 private:
  static constexpr int kMost = 16;

  void compare(const Array& array) {
    for (int n = 0; n < count_; ++n)
      if (array.low < kept_[n].high && kept_[n].low < array.high)
        overlap_ = overlap_ || have_common_byte(array, kept_[n]);
  }

  int64_t first_, written_ = 0;
  bool overlap_ = false;
  int count_ = 0;
  Array kept_[kMost];
};

// list(arrays): names the arrays of a call.
template <typename List>
bool any_overlap(const List& list) {
  for (int64_t first = 0; first >= 0;) {
    Arrays arrays(first);
    list(arrays);
    if (arrays.overlap()) return true;
    first = arrays.next();
  }
  return false;
}

}  // namespace nabla_fast

#endif  // NABLA_FAST_CPU_BASE_OVERLAP_H_
