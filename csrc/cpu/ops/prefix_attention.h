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
#include <cstddef>
#include <cstdint>
#include <limits>

#include "base/args.h"
#include "base/check.h"
#include "base/floats.h"
#include "base/isa.h"
#include "base/overlap.h"
#include "base/threads.h"
#include "nabla_fast.h"
#include "simd/vec.h"
#include "simd/vec_tanh.h"

namespace nabla_fast {

template <>
inline constexpr int64_t kFirstVersionBytes<nabla_fast_attention_args> =
    offsetof(nabla_fast_attention_args, logsumexp);

}  // namespace nabla_fast

namespace nabla_fast::attention {

constexpr int64_t kKeysPerTile = 64;
// Products of a query and a key that are summed in one chain: rounding grows with its length.
constexpr int64_t kScoreChain = 128;
// Factor of weights whose sums stay finite: with numbers up to 2^128, those of 2^31 keys reach 2^95.
constexpr float kSmallScale = 0x1p-64f;
constexpr int64_t kMaxHeadDim = NABLA_FAST_MOST_HEAD_DIM;
// Positions are counted in 32-bit lanes.
constexpr int64_t kMaxPositions = std::numeric_limits<int32_t>::max();

// [dim] of a tensor [batch, heads, tokens, dim].
template <typename Heads>
auto* token_of(const Heads& heads, int64_t batch, int64_t head, int64_t token) {
  return heads.data + batch * heads.batch_stride + head * heads.head_stride +
         token * heads.token_stride;
}

// Keys or values of one head of one sequence: those of the prefix, then those of the suffix.
struct Sequence {
  nabla_fast_pool pool;  // of this head
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
      const float* of_block = pool.data + table[block] * pool.block_stride;
      for (; t < stop; ++t) *rows++ = of_block + (t - first) * pool.token_stride;
    }
    for (int64_t t = std::max(begin, prefix); t < end; ++t) {
      *rows++ = own + (t - prefix) * own_stride;
    }
  }
};

inline Sequence sequence_of(const nabla_fast_attention_args& a, const nabla_fast_pool& pool,
                            const nabla_fast_heads& own, int64_t batch, int64_t kv_head) {
  const int64_t prefix = a.prefix_lengths[batch];
  nabla_fast_pool of_head = pool;
  const int64_t* table = nullptr;
  // Without a prefix, pool and table may be nowhere.
  if (prefix > 0) {
    of_head.data += kv_head * pool.head_stride;
    table = a.block_tables + batch * a.table_stride;
  }
  return {of_head, a.block_size, table, prefix, token_of(own, batch, kv_head, 0), own.token_stride};
}

inline Sequence keys_of(const nabla_fast_attention_args& a, int64_t batch, int64_t kv_head) {
  return sequence_of(a, a.key_pool, a.k, batch, kv_head);
}

inline Sequence values_of(const nabla_fast_attention_args& a, int64_t batch, int64_t kv_head) {
  return sequence_of(a, a.value_pool, a.v, batch, kv_head);
}

// The first position that a token at `position` sees.
inline int64_t first_seen(const nabla_fast_attention_args& a, int64_t position) {
  return a.window > 0 ? std::max<int64_t>(position - a.window + 1, 0) : 0;
}

// The score of the sink of a query head; -inf where there is none.
inline float sink_of(const nabla_fast_attention_args& a, int64_t head) {
  return a.sinks ? a.sinks[head] : -kInfinity;
}

inline bool has_no_queries(const nabla_fast_attention_args& a) {
  return a.batch == 0 || a.heads == 0 || a.suffix == 0;
}

// OK if a [batch, heads, suffix, dim] tensor with `heads` heads can be there.
template <typename Heads>
nabla_fast_status check_heads(const nabla_fast_attention_args& a, const Heads& tensor,
                              int64_t heads) {
  if (!fits({{a.batch, tensor.batch_stride},
             {heads, tensor.head_stride},
             {a.suffix, tensor.token_stride},
             {a.dim, 1}},
            4))
    return NABLA_FAST_TOO_LARGE;
  return tensor.data ? NABLA_FAST_OK : NABLA_FAST_INVALID_POINTER;
}

template <typename Heads>
Array heads_array(const nabla_fast_attention_args& a, const Heads& tensor, int64_t heads) {
  return {tensor.data,
          {{a.batch, tensor.batch_stride},
           {heads, tensor.head_stride},
           {a.suffix, tensor.token_stride}},
          a.dim,
          4};
}

inline bool pool_fits(const nabla_fast_attention_args& a, const nabla_fast_pool& pool) {
  return fits({{a.blocks, pool.block_stride},
               {a.block_size, pool.token_stride},
               {a.kv_heads, pool.head_stride},
               {a.dim, 1}},
              4);
}

inline Array pool_array(const nabla_fast_attention_args& a, const nabla_fast_pool& pool) {
  return {pool.data,
          {{a.blocks, pool.block_stride},
           {a.block_size, pool.token_stride},
           {a.kv_heads, pool.head_stride}},
          a.dim,
          4};
}

// OK, or why what both functions read is refused, prefixes included: work and workspace depend on
// their lengths.
inline nabla_fast_status check_attention(const nabla_fast_attention_args& a) {
  if (a.batch < 0 || a.heads < 0 || a.kv_heads < 1 || a.suffix < 0 || a.dim < 1 ||
      a.dim > kMaxHeadDim || a.heads % a.kv_heads != 0 || a.blocks < 0 || a.block_size < 1 ||
      a.table_width < 0 || a.window < 0) {
    return NABLA_FAST_INVALID_HEADS;
  }
  if (a.softcap != 0 && !(a.softcap >= 0x1p-64 && a.softcap <= 0x1p64))
    return NABLA_FAST_INVALID_SOFTCAP;
  if (has_no_queries(a)) return NABLA_FAST_OK;
  if (const auto refused = check_heads(a, a.q, a.heads)) return refused;
  if (const auto refused = check_heads(a, a.k, a.kv_heads)) return refused;
  if (const auto refused = check_heads(a, a.v, a.kv_heads)) return refused;
  if (!pool_fits(a, a.key_pool) || !pool_fits(a, a.value_pool) || !fits({{a.batch, 1}}, 8) ||
      !fits({{a.batch, a.table_stride}, {a.table_width, 1}}, 8) ||
      !(Size(a.batch) * a.heads * a.suffix * a.dim * 4).fits() || a.suffix > kMaxPositions)
    return NABLA_FAST_TOO_LARGE;
  if (!a.prefix_lengths) return NABLA_FAST_INVALID_POINTER;
  const int64_t most_prefix = (Size(a.table_width) * a.block_size).or_most();
  for (int64_t b = 0; b < a.batch; ++b) {
    const int64_t length = a.prefix_lengths[b];
    if (length < 0 || length > most_prefix) return NABLA_FAST_INVALID_PREFIX;
    if (length > kMaxPositions - a.suffix) return NABLA_FAST_TOO_LARGE;
    if (length > 0 && (!a.key_pool.data || !a.value_pool.data || !a.block_tables)) {
      return NABLA_FAST_INVALID_POINTER;
    }
    for (int64_t n = 0; n * a.block_size < length; ++n) {
      const int64_t block = a.block_tables[b * a.table_stride + n];
      if (block < 0 || block >= a.blocks) return NABLA_FAST_INVALID_PREFIX;
    }
  }
  return NABLA_FAST_OK;
}

// What both functions read.
inline void list_inputs(const nabla_fast_attention_args& a, Arrays& arrays) {
  arrays.reads(heads_array(a, a.q, a.heads));
  arrays.reads(heads_array(a, a.k, a.kv_heads));
  arrays.reads(heads_array(a, a.v, a.kv_heads));
  arrays.reads(pool_array(a, a.key_pool));
  arrays.reads(pool_array(a, a.value_pool));
  arrays.reads({a.block_tables, {{a.batch, a.table_stride}}, a.table_width, 8});
  arrays.reads(array_of(a.prefix_lengths, a.batch));
  arrays.reads(array_of(a.sinks, a.heads));
}

// Multiplications of one product of queries with the keys that they see.
inline int64_t attention_work(const nabla_fast_attention_args& a) {
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

// Caps scores s [count], of which W divides the number: s becomes cap tanh(s / cap).
template <int W>
NABLA_FAST_INLINE void cap_scores(float* s, int64_t count, float cap) {
  for (int64_t n = 0; n < count; n += W) store<W>(s + n, cap * vec_tanh<W>(load<W>(s + n) / cap));
}

// Slopes of capped scores s [count], d capped / d score = 1 - tanh^2.
template <int W>
NABLA_FAST_INLINE void slopes_of(const float* s, int64_t count, float cap, float* slopes) {
  for (int64_t n = 0; n < count; n += W) {
    const Floats<W> t = load<W>(s + n) / cap;
    store<W>(slopes + n, (1.0f - t) * (1.0f + t));
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
