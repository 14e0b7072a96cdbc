// Checks of a C function's arguments, before it reads or writes anything.
//
// A function checks in this order. `check` is what its size query checks too: what is read, and
// nothing that is written.
//
//   nabla_fast_status check(const nabla_fast_..._args& call) {
//     if (call.rows < 0 || call.vocab < 1) return NABLA_FAST_INVALID_SHAPE;
//     if (!is_tau(call.tau)) return NABLA_FAST_INVALID_TAU;
//     if (call.rows == 0) return NABLA_FAST_OK;
//     return check_matrix(call.logits, call.rows, call.vocab);  // of every matrix
//   }
//
//   nabla_fast_..._args call;
//   if (const auto refused = read_args(args, call)) return refused;      // base/args.h
//   if (const auto refused = check(call)) return refused;
//   if (call.rows == 0) return NABLA_FAST_OK;
//   if (!fits({{call.rows, 1}}, 8)) return NABLA_FAST_TOO_LARGE;         // of [rows] arrays
//   if (!call.argmax) return NABLA_FAST_INVALID_POINTER;
//   if (const auto refused = check_workspace(call, bytes)) return refused;
//   if (any_overlap(...)) return NABLA_FAST_OVERLAP;                     // base/overlap.h
//   ...                           // what needs memory to be read: tokens, step counts
//   auto* memory = aligned(call.workspace);
//
// Numbers of bytes are computed with Size, and so is the work that decides about threads, which may
// pass any limit where a stride is 0:
//
//   threads_for((Size(rows) * vocab).or_most(), kWorkPerThread, num_threads)
#ifndef NABLA_FAST_CPU_BASE_CHECK_H_
#define NABLA_FAST_CPU_BASE_CHECK_H_

#include <cstdint>
#include <initializer_list>

#include "nabla_fast.h"

namespace nabla_fast {

// More bytes than an address space has; sums of a few sizes below it are far from overflowing.
constexpr int64_t kMaxBytes = int64_t{1} << 56;

// Number of elements or bytes. Beyond kMaxBytes, or below 0, it has no value, and neither has
// anything computed from it.
class Size {
 public:
  constexpr Size(int64_t value) : value_(value >= 0 && value <= kMaxBytes ? value : -1) {}

  constexpr bool fits() const { return value_ >= 0; }
  constexpr int64_t or_zero() const { return fits() ? value_ : 0; }
  constexpr int64_t or_most() const { return fits() ? value_ : kMaxBytes; }
  constexpr Size rounded_up(int64_t unit) const {
    return fits() ? Size((value_ + unit - 1) / unit * unit) : *this;
  }

  friend constexpr Size operator+(Size a, Size b) {
    return a.fits() && b.fits() ? Size(a.value_ + b.value_) : Size(-1);
  }
  friend constexpr Size operator*(Size a, Size b) {
    int64_t product = -1;
    if (!a.fits() || !b.fits() || __builtin_mul_overflow(a.value_, b.value_, &product))
      return Size(-1);
    return Size(product);
  }

 private:
  int64_t value_;
};

// Dimension of a tensor: how many, and how many elements apart.
struct Axis {
  int64_t count, stride;
};

// True if no element of a tensor lies further than kMaxBytes from its first. Counts are not
// negative; strides may be.
inline bool fits(std::initializer_list<Axis> axes, int64_t element_bytes) {
  Size span = 0;
  for (const Axis& axis : axes) {
    if (axis.count == 0) return true;
    if (axis.count == 1) continue;
    // The smallest int64 has no absolute value.
    const int64_t stride = axis.stride < -kMaxBytes ? kMaxBytes + 1 : axis.stride;
    span = span + Size(axis.count - 1) * (stride < 0 ? -stride : stride);
  }
  return ((span + 1) * element_bytes).fits();
}

// Stride to compute addresses with. Where there is one element, or none, nothing lies a stride away
// and callers may pass any number.
inline int64_t step_of(int64_t count, int64_t stride) { return count > 1 ? stride : 0; }

// The same of a matrix; where it has no columns, callers may pass any number too.
template <typename Matrix>
int64_t stride_of(const Matrix& matrix, int64_t rows) {
  return step_of(matrix.width > 0 ? rows : 0, matrix.stride);
}

inline int64_t bytes_of(nabla_fast_dtype dtype) { return dtype == NABLA_FAST_FLOAT32 ? 4 : 2; }

// OK if `rows` rows of a matrix that is read, or written, are `width` wide and can be there.
template <typename Matrix>
nabla_fast_status check_matrix(const Matrix& matrix, int64_t rows, int64_t width) {
  if (matrix.width < 0 || matrix.width != width) return NABLA_FAST_INVALID_SHAPE;
  if (matrix.dtype != NABLA_FAST_FLOAT32 && matrix.dtype != NABLA_FAST_BFLOAT16)
    return NABLA_FAST_UNKNOWN_DTYPE;
  if (!fits({{rows, matrix.stride}, {width, 1}}, bytes_of(matrix.dtype)))
    return NABLA_FAST_TOO_LARGE;
  return !matrix.data && rows > 0 && width > 0 ? NABLA_FAST_INVALID_POINTER : NABLA_FAST_OK;
}

// The same of a matrix that can only be float32.
template <typename Matrix>
nabla_fast_status check_float32(const Matrix& matrix, int64_t rows, int64_t width) {
  const nabla_fast_status status = check_matrix(matrix, rows, width);
  if (status == NABLA_FAST_INVALID_SHAPE || matrix.dtype == NABLA_FAST_FLOAT32) return status;
  return NABLA_FAST_UNKNOWN_DTYPE;
}

inline bool is_tau(double tau) { return tau >= 0x1p-64 && tau <= 0x1p64; }

// Bytes that a size query adds for a workspace that may lie anywhere, and the first aligned byte of
// one.
constexpr int64_t kAlignment = 64;

inline char* aligned(void* workspace) {
  const auto address = reinterpret_cast<uintptr_t>(workspace);
  return static_cast<char*>(workspace) + (kAlignment - address % kAlignment) % kAlignment;
}

}  // namespace nabla_fast

#endif  // NABLA_FAST_CPU_BASE_CHECK_H_
