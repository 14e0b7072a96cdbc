// Parts of tables as fp32.
#ifndef NABLA_FAST_CPU_GEMM_WIDEN_H_
#define NABLA_FAST_CPU_GEMM_WIDEN_H_

#include <algorithm>
#include <cstdint>
#include <cstring>

#include "base/isa.h"
#include "gemm/vocab_tiles.h"
#include "simd/vec.h"

namespace nabla_fast::gemm {

template <int W>
NABLA_FAST_INLINE Floats<W> load_fp32(const float* x) {
  return load<W>(x);
}

template <int W>
NABLA_FAST_INLINE Floats<W> load_fp32(const uint16_t* bf16) {
  typedef uint16_t Halves __attribute__((vector_size(2 * W)));
  using Bits = typename VecTypes<W>::Bits;
  Halves halves;
  std::memcpy(&halves, bf16, sizeof halves);
  return (Floats<W>)(__builtin_convertvector(halves, Bits) << 16);
}

// to[k] = from[k] for k < columns, and zeros up to the next multiple of 16.
template <int W, typename T>
NABLA_FAST_INLINE void to_fp32(const T* from, int64_t columns, float* to) {
  int64_t k = 0;
  for (; k + 16 <= columns; k += 16) {
#pragma GCC unroll 4
    for (int part = 0; part < 16; part += W) store<W>(to + k + part, load_fp32<W>(from + k + part));
  }
  if (k == columns) return;
  T last[16] = {};
  std::memcpy(last, from + k, sizeof(T) * static_cast<size_t>(columns - k));
#pragma GCC unroll 4
  for (int part = 0; part < 16; part += W) store<W>(to + k + part, load_fp32<W>(last + part));
}

// The same for columns [column, column + columns) of one row of a table.
template <int W>
NABLA_FAST_INLINE void to_fp32(const Table& table, int64_t token, int64_t column, int64_t columns,
                               float* to) {
  const int64_t at = token * table.stride + column;
  if (table.dtype == NABLA_FAST_FLOAT32)
    to_fp32<W>(static_cast<const float*>(table.data) + at, columns, to);
  else
    to_fp32<W>(static_cast<const uint16_t*>(table.data) + at, columns, to);
}

}  // namespace nabla_fast::gemm

#endif  // NABLA_FAST_CPU_GEMM_WIDEN_H_
