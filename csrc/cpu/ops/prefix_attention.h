// Keys and values in memory, which of them a query sees, and the two products of a tile: for the
// forward and the backward of prefix_attention.
//
// A tile has W rows, one in each lane of a vector, and up to kKeysPerTile others. The rows stand
// transposed, element d of all of them in one vector, so that neither product adds across lanes:
//
//   scores      s[j] = scale sum_d others[j][d] rows[d]
//   accumulate  sum[d] += sum_j others[j][d] weights[j]
#ifndef NABLA_FAST_CPU_OPS_PREFIX_ATTENTION_H_
#define NABLA_FAST_CPU_OPS_PREFIX_ATTENTION_H_

#include <algorithm>
#include <cstdint>
#include <limits>

#include "base/check.h"
#include "base/floats.h"
#include "base/isa.h"
#include "base/threads.h"
#include "nabla_fast.h"
#include "simd/vec.h"

namespace nabla_fast::attention {

constexpr int64_t kKeysPerTile = 64;
// Products of a query and a key that are summed in one chain: rounding grows with its length.
constexpr int64_t kScoreChain = 128;
// Factor of weights whose sums stay finite: with numbers up to 2^128, those of 2^31 keys reach 2^95.
constexpr float kSmallScale = 0x1p-64f;
constexpr int64_t kMaxHeadDim = NABLA_FAST_MOST_HEAD_DIM;
// Positions are counted in 32-bit lanes.
constexpr int64_t kMaxPositions = std::numeric_limits<int32_t>::max();

// A [batch, heads, tokens, dim] tensor, dim contiguous.
template <typename T>
struct Heads {
  T* data;
  nabla_fast_strides strides;

  T* at(int64_t batch, int64_t head, int64_t token) const {
    return data + batch * strides.batch + head * strides.head + token * strides.token;
  }
};

// Keys or values of one head of one sequence: those of the prefix, then those of the suffix.
struct Sequence {
  const float* pool;  // of this head
  nabla_fast_pool_strides strides;
  int64_t block_size;
  const int64_t* table;
  int64_t prefix;
  const float* own;  // of this sequence and head
  int64_t own_stride;

  // Addresses of the tokens at positions begin to end - 1.
  void find(int64_t begin, int64_t end, const float** rows) const {
    for (int64_t t = begin; t < std::min(end, prefix);) {
      const int64_t block = t / block_size, first = block * block_size;
      const int64_t stop = std::min({end, prefix, first + block_size});
      const float* of_block = pool + table[block] * strides.block;
      for (; t < stop; ++t) *rows++ = of_block + (t - first) * strides.token;
    }
    for (int64_t t = std::max(begin, prefix); t < end; ++t) {
      *rows++ = own + (t - prefix) * own_stride;
    }
  }
};

inline Sequence keys_of(const nabla_fast_attention& a, int64_t batch, int64_t kv_head) {
  return {a.key_pool + kv_head * a.key_pool_strides.head,
          a.key_pool_strides,
          a.block_size,
          a.block_tables + batch * a.table_stride,
          a.prefix_lengths[batch],
          a.k + batch * a.k_strides.batch + kv_head * a.k_strides.head,
          a.k_strides.token};
}

inline Sequence values_of(const nabla_fast_attention& a, int64_t batch, int64_t kv_head) {
  return {a.value_pool + kv_head * a.value_pool_strides.head,
          a.value_pool_strides,
          a.block_size,
          a.block_tables + batch * a.table_stride,
          a.prefix_lengths[batch],
          a.v + batch * a.v_strides.batch + kv_head * a.v_strides.head,
          a.v_strides.token};
}

// The first position that a token at `position` sees.
inline int64_t first_seen(const nabla_fast_attention& a, int64_t position) {
  return a.window > 0 ? std::max<int64_t>(position - a.window + 1, 0) : 0;
}

inline bool has_no_queries(const nabla_fast_attention& a) {
  return a.batch == 0 || a.heads == 0 || a.suffix == 0;
}

// True if a [batch, heads, suffix, dim] tensor with `heads` heads has a size.
inline bool tensor_fits(const nabla_fast_attention& a, int64_t heads,
                        const nabla_fast_strides& strides) {
  return fits(
      {{a.batch, strides.batch}, {heads, strides.head}, {a.suffix, strides.token}, {a.dim, 1}}, 4);
}

inline bool pool_fits(const nabla_fast_attention& a, const nabla_fast_pool_strides& strides) {
  return fits({{a.blocks, strides.block},
               {a.block_size, strides.token},
               {a.kv_heads, strides.head},
               {a.dim, 1}},
              4);
}

inline nabla_fast_status check_attention(const nabla_fast_attention& a) {
  if (a.batch < 0 || a.heads < 0 || a.kv_heads < 1 || a.suffix < 0 || a.dim < 1 ||
      a.dim > kMaxHeadDim || a.heads % a.kv_heads != 0 || a.blocks < 0 || a.block_size < 1 ||
      a.table_width < 0 || a.window < 0) {
    return NABLA_FAST_INVALID_HEADS;
  }
  if (has_no_queries(a)) return NABLA_FAST_OK;
  if (!tensor_fits(a, a.heads, a.q_strides) || !tensor_fits(a, a.kv_heads, a.k_strides) ||
      !tensor_fits(a, a.kv_heads, a.v_strides) || !pool_fits(a, a.key_pool_strides) ||
      !pool_fits(a, a.value_pool_strides) ||
      !fits({{a.batch, a.table_stride}, {a.table_width, 1}}, 8) ||
      !(Size(a.batch) * a.heads * a.suffix * a.dim * 4).fits() || a.suffix > kMaxPositions)
    return NABLA_FAST_TOO_LARGE;
  if (!a.q || !a.k || !a.v || !a.prefix_lengths) return NABLA_FAST_INVALID_POINTER;
  const int64_t most_prefix = (Size(a.table_width) * a.block_size).or_most();
  for (int64_t b = 0; b < a.batch; ++b) {
    const int64_t length = a.prefix_lengths[b];
    if (length < 0 || length > most_prefix) return NABLA_FAST_INVALID_PREFIX;
    if (length > kMaxPositions - a.suffix) return NABLA_FAST_TOO_LARGE;
    if (length > 0 && (!a.key_pool || !a.value_pool || !a.block_tables)) {
      return NABLA_FAST_INVALID_POINTER;
    }
    for (int64_t n = 0; n * a.block_size < length; ++n) {
      const int64_t block = a.block_tables[b * a.table_stride + n];
      if (block < 0 || block >= a.blocks) return NABLA_FAST_INVALID_PREFIX;
    }
  }
  return NABLA_FAST_OK;
}

// Multiplications of one product of queries with the keys that they see.
inline int64_t attention_work(const nabla_fast_attention& a) {
  int64_t keys = 0;
  for (int64_t b = 0; b < a.batch; ++b) {
    const int64_t seen = a.prefix_lengths[b] + (a.suffix + 1) / 2;
    keys += a.window > 0 ? std::min(seen, a.window) : seen;
  }
  return (Size(keys) * a.heads * a.suffix * a.dim).or_most();
}

// sum[j] += sum of others[j][d] rows[d] over columns [first, last), in one chain.
template <int W>
NABLA_FAST_INLINE void add_products(const float* const* others, const float* rows, int64_t first,
                                    int64_t last, Floats<W> (&sum)[8]) {
  for (int64_t d = first; d < last; ++d) {
    const Floats<W> row = load<W>(rows + d * W);
#pragma GCC unroll 8
    for (int j = 0; j < 8; ++j) sum[j] += others[j][d] * row;
  }
}

// others: [count] addresses of [dim]; rows: [dim] vectors; s: [count rounded up to 8] vectors, of
// which those behind `count` repeat the last.
template <int W>
NABLA_FAST_INLINE void scores(const float* const* others, int64_t count, const float* rows,
                              int64_t dim, float scale, float* s) {
  for (int64_t begin = 0; begin < count; begin += 8) {
    const float* other[8];
    for (int64_t j = 0; j < 8; ++j) other[j] = others[std::min(begin + j, count - 1)];
    Floats<W> sum[8] = {};
    add_products<W>(other, rows, 0, std::min(kScoreChain, dim), sum);
    for (int64_t first = kScoreChain; first < dim; first += kScoreChain) {
      Floats<W> chain[8] = {};
      add_products<W>(other, rows, first, std::min(first + kScoreChain, dim), chain);
#pragma GCC unroll 8
      for (int j = 0; j < 8; ++j) sum[j] += chain[j];
    }
#pragma GCC unroll 8
    for (int j = 0; j < 8; ++j) store<W>(s + (begin + j) * W, sum[j] * scale);
  }
}

template <int W, int kWide>
NABLA_FAST_INLINE void accumulate_some(const float* const* others, int64_t count,
                                       const float* weights, int64_t d, float* sums) {
  Floats<W> sum[kWide] = {};
  for (int64_t j = 0; j < count; ++j) {
    const Floats<W> weight = load<W>(weights + j * W);
    const float* other = others[j] + d;
#pragma GCC unroll 8
    for (int n = 0; n < kWide; ++n) sum[n] += other[n] * weight;
  }
#pragma GCC unroll 8
  for (int n = 0; n < kWide; ++n) {
    store<W>(sums + (d + n) * W, load<W>(sums + (d + n) * W) + sum[n]);
  }
}

// weights: [count] vectors; sums: [dim] vectors, added to.
template <int W>
NABLA_FAST_INLINE void accumulate(const float* const* others, int64_t count, const float* weights,
                                  int64_t dim, float* sums) {
  int64_t d = 0;
  for (; d + 8 <= dim; d += 8) accumulate_some<W, 8>(others, count, weights, d, sums);
  for (; d < dim; ++d) accumulate_some<W, 1>(others, count, weights, d, sums);
}

// exp(x) for x <= 0, 0 where it is negligible; NaN lanes are added to `nan`.
template <int W>
NABLA_FAST_INLINE Floats<W> exp_of_negative(Floats<W> x, Ints<W>& nan) {
  nan |= x != x;
  return x > kMinExponent ? vec_exp_normal<W>(x) : Floats<W>{};
}

}  // namespace nabla_fast::attention

#endif  // NABLA_FAST_CPU_OPS_PREFIX_ATTENTION_H_
