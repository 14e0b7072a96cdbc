// Checks of calls whose memory is a device's, and what launchers share.
#ifndef NABLA_FAST_CUDA_CALL_H_
#define NABLA_FAST_CUDA_CALL_H_

#include <algorithm>
#include <cstdint>

#include "base/args.h"
#include "base/check.h"
#include "base/overlap.h"
#include "device.h"
#include "nabla_fast_cuda.h"
#include "products.h"
#include "slices.h"

namespace nabla_fast::cuda {

// Most tokens of a vocabulary: token indices of kernels are 32 bits wide, with room to add to them.
constexpr int64_t kMostTokens = int64_t{1} << 30;

// base/check.h's check_matrix(), for which float16 is a dtype too.
template <typename Matrix>
nabla_fast_status check_device_matrix(Matrix matrix, int64_t rows, int64_t width) {
  // Elements of the same size.
  if (matrix.dtype == NABLA_FAST_FLOAT16) matrix.dtype = NABLA_FAST_BFLOAT16;
  return check_matrix(matrix, rows, width);
}

// Calls visit with a zero of the type that a dtype stands for.
template <typename Visit>
auto with_element(nabla_fast_dtype dtype, const Visit& visit) {
  if (dtype == NABLA_FAST_FLOAT32) return visit(float{});
  if (dtype == NABLA_FAST_BFLOAT16) return visit(bfloat16{});
  return visit(float16{});
}

// Calls visit with true or false as a type.
template <bool kValue>
struct Flag {
  static constexpr bool value = kValue;
};
template <typename Visit>
auto with_flag(bool flag, const Visit& visit) {
  return flag ? visit(Flag<true>{}) : visit(Flag<false>{});
}

// A matrix's rows from number `first` on.
template <typename T>
Rows<const T> rows_from(const nabla_fast_matrix& matrix, int64_t rows, int64_t first) {
  const int64_t stride = stride_of(matrix, rows);
  return {static_cast<const T*>(matrix.data) + first * stride, stride};
}
template <typename T>
Rows<T> rows_from(const nabla_fast_output& matrix, int64_t rows, int64_t first) {
  const int64_t stride = stride_of(matrix, rows);
  return {static_cast<T*>(matrix.data) + first * stride, stride};
}

// Arrays one after the other in a workspace; without one, only their size.
class Layout {
 public:
  explicit Layout(char* memory) : memory_(memory) {}

  template <typename T>
  T* array(Size count) {
    const Size begin = bytes_;
    bytes_ = (bytes_ + count * int64_t{sizeof(T)}).rounded_up(kAlignment);
    return memory_ ? reinterpret_cast<T*>(memory_ + begin.or_zero()) : nullptr;
  }
  // The workspace of products, null where they have none.
  void* product_workspace() {
    constexpr int64_t kUnit = 256;
    const int64_t bytes = product_workspace_bytes();
    if (bytes == 0) return nullptr;
    const auto begin = reinterpret_cast<uintptr_t>(array<char>(bytes + kUnit));
    return reinterpret_cast<void*>((begin + kUnit - 1) / kUnit * kUnit);
  }
  Size bytes() const { return bytes_; }

 private:
  char* memory_;
  Size bytes_ = 0;
};

// Bytes of the part of a row's data that one chunk holds: two thirds of the L2 cache of an H100 or
// H200, which has 50 MB.
#if !defined(NABLA_FAST_CUDA_CHUNK_BYTES)
  #define NABLA_FAST_CUDA_CHUNK_BYTES (32 << 20)
#endif
constexpr int64_t kChunkBytes = NABLA_FAST_CUDA_CHUNK_BYTES;

// Most rows that are worked on at once.
#if !defined(NABLA_FAST_CUDA_MOST_ROWS)
  #define NABLA_FAST_CUDA_MOST_ROWS 1024
#endif
constexpr int64_t kMostRows = NABLA_FAST_CUDA_MOST_ROWS;

// Slices of each chunk, for some rows that have `token_bytes` a token each: chunks of nearly equal
// size whose data fit into kChunkBytes, or of one slice.
inline int64_t slices_of_chunk(int64_t rows, int64_t vocab, int64_t token_bytes) {
  const int64_t slices = slices_of(vocab);
  const int64_t most =
      std::max<int64_t>(kChunkBytes / std::max<int64_t>(rows * token_bytes * kSliceTokens, 1), 1);
  const int64_t chunks = (slices + most - 1) / most;
  return (slices + chunks - 1) / chunks;
}

// Calls visit(chunk) for each chunk in order, until one returns false; whether none has.
template <typename Visit>
bool for_each_chunk(int64_t vocab, int64_t slices_of_each, const Visit& visit) {
  const auto slices = static_cast<int>(slices_of(vocab));
  for (int first = 0; first < slices; first += static_cast<int>(slices_of_each)) {
    const int count = std::min(slices - first, static_cast<int>(slices_of_each));
    if (!visit(Chunk{first, count, slices, static_cast<int>(vocab)})) return false;
  }
  return true;
}

// Calls visit(first, rows) for parts of the rows, until one returns false; whether none has.
template <typename Visit>
bool for_each_part(int64_t rows, int64_t most, const Visit& visit) {
  for (int64_t first = 0; first < rows; first += most)
    if (!visit(first, std::min(most, rows - first))) return false;
  return true;
}

// What a function returns, given whether all its launches were taken.
inline nabla_fast_status answer(bool launched) {
  if (launched) return NABLA_FAST_OK;
  return static_cast<nabla_fast_status>(NABLA_FAST_DEVICE_REFUSED);
}

// Of a mix: OK, or why what forward and backward read is refused.
nabla_fast_status check_mix(const nabla_fast_mix_args& call);
// What both read.
void list_mix_inputs(const nabla_fast_mix_args& call, Arrays& arrays);

inline Noise noise_from(const nabla_fast_mix_args& call, int64_t first) {
  if (!call.noise_seed) return {nullptr, nullptr};
  return {call.noise_seed + first, call.noise_position + first};
}

}  // namespace nabla_fast::cuda

#endif  // NABLA_FAST_CUDA_CALL_H_
