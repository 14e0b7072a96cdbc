// nabla_fast_prefix_attention: softmax over tiles of keys, read where they lie.
//
// Query heads that share a key-value head, and the tokens of the suffix, make up its rows, row n
// being token n / group and head n mod group of the group. Many rows go into lanes, W at a time.
// Few rows, as in a decode step, would leave most lanes empty: there the lanes go along the head
// instead.
//
// Values may be so large that their sums overflow though the results do not: then a second pass has
// smaller weights.

#include "ops/prefix_attention.h"

#include <cmath>

#include "base/floats.h"

namespace nabla_fast::attention {
namespace {

// Multiplications worth another thread.
constexpr int64_t kWorkPerThread = int64_t{1} << 19;
constexpr int64_t kMaxSingleRows = 16;

struct Call {
  const nabla_fast_attention_args& in;
  int64_t group;  // query heads of a key-value head

  int64_t rows() const { return group * in.suffix; }
  const float* query(int64_t batch, int64_t kv_head, int64_t row) const {
    return token_of(in.q, batch, kv_head * group + row % group, row / group);
  }
  float* result(int64_t batch, int64_t kv_head, int64_t row) const {
    return token_of(in.output, batch, kv_head * group + row % group, row / group);
  }
  // Puts the logsumexp of a row whose exponentials, less `max`, add up to `total`.
  void put_logsumexp(int64_t batch, int64_t kv_head, int64_t row, float max, float total) const {
    if (!in.logsumexp) return;
    const int64_t head = batch * in.heads + kv_head * group + row % group;
    in.logsumexp[head * in.suffix + row / group] =
        static_cast<float>(double{max} + std::log(double{total}));
  }
};

// Factors of the weights in the first pass and in the second.
constexpr float kWeightScales[] = {1, kSmallScale};

// Whether all sums are finite; W divides `count`.
template <int W>
NABLA_FAST_INLINE bool are_finite(const float* sums, int64_t count) {
  typename VecTypes<W>::Bits bits = {};
  for (int64_t n = 0; n < count; n += W) {
    const Floats<W> sum = load<W>(sums + n);
    bits |= (typename VecTypes<W>::Bits)(sum - sum);  // 0 or NaN
  }
  uint32_t any = 0;
  for (int lane = 0; lane < W; ++lane) any |= bits[lane];
  return any == 0;
}

// Puts a result: of the second pass where that of the first is not finite.
NABLA_FAST_INLINE void put_result(float result, float weight_scale, float& out) {
  if (weight_scale == 1 || (!std::isfinite(out) && std::isfinite(result))) out = result;
}

// -- rows in lanes --------------------------------------------------------------------------------

// Rows first to first + W - 1 of a key-value head; those behind the last repeat it. Returns whether
// sums are finite.
template <int W>
NABLA_FAST_INLINE bool attend_rows_in_lanes(const Call& call, int64_t batch, int64_t kv_head,
                                            int64_t first, float weight_scale) {
  const nabla_fast_attention_args& in = call.in;
  const Sequence keys = keys_of(in, batch, kv_head), values = values_of(in, batch, kv_head);
  const int64_t last = std::min(first + W, call.rows()) - 1;
  const float scale = static_cast<float>(in.scale), cap = static_cast<float>(in.softcap);
  alignas(64) float q[kMaxHeadDim * W], sums[kMaxHeadDim * W], s[kKeysPerTile * W];
  const float* others[kKeysPerTile];
  Ints<W> position, lowest;
  Floats<W> max = {};
  for (int lane = 0; lane < W; ++lane) {
    const int64_t row = std::min(first + lane, last);
    max[lane] = sink_of(in, kv_head * call.group + row % call.group);
    const float* query = call.query(batch, kv_head, row);
    for (int64_t d = 0; d < in.dim; ++d) q[d * W + lane] = query[d];
    position[lane] = static_cast<int32_t>(keys.prefix + row / call.group);
    lowest[lane] = static_cast<int32_t>(first_seen(in, position[lane]));
  }
  std::fill(sums, sums + in.dim * W, 0.0f);
  // The sink is the first score of a row, if it has one.
  Floats<W> total = max > -kInfinity ? splat<W>(1.0f) : Floats<W>{};
  Ints<W> nan = max != max;

  const int64_t end = position[W - 1] + 1;
  for (int64_t begin = lowest[0]; begin < end; begin += kKeysPerTile) {
    const int64_t count = std::min(kKeysPerTile, end - begin);
    keys.find(begin, begin + count, others);
    scores<W>(others, count, q, in.dim, scale, s);
    if (cap > 0) cap_scores<W>(s, count * W, cap);
    if (begin < lowest[W - 1] || begin + count - 1 > position[0]) {
      for (int64_t j = 0; j < count; ++j) {
        const int32_t t = static_cast<int32_t>(begin + j);
        const Ints<W> seen = (t <= position) & (t >= lowest);
        store<W>(s + j * W, seen ? load<W>(s + j * W) : splat<W>(-kInfinity));
      }
    }
    Floats<W> tile_max = max;
    for (int64_t j = 0; j < count; ++j) {
      const Floats<W> score = load<W>(s + j * W);
      tile_max = score > tile_max ? score : tile_max;
    }
    // A row may have seen nothing yet.
    const Floats<W> base = tile_max > -kInfinity ? tile_max : Floats<W>{};
    const Floats<W> rescale = exp_of_negative<W>(max - base, nan);
    Floats<W> tile_total = {};
    for (int64_t j = 0; j < count; ++j) {
      const Floats<W> e = exp_of_negative<W>(load<W>(s + j * W) - base, nan);
      store<W>(s + j * W, e * weight_scale);
      tile_total += e;
    }
    total = total * rescale + tile_total;
    max = tile_max;
    for (int64_t d = 0; d < in.dim; ++d) store<W>(sums + d * W, load<W>(sums + d * W) * rescale);
    values.find(begin, begin + count, others);
    accumulate<W>(others, count, s, in.dim, sums);
  }
  for (int lane = 0; first + lane <= last; ++lane) {
    const float sum = nan[lane] ? kNaN : total[lane], inverse = 1 / (weight_scale * sum);
    call.put_logsumexp(batch, kv_head, first + lane, max[lane], sum);
    float* result = call.result(batch, kv_head, first + lane);
    for (int64_t d = 0; d < in.dim; ++d)
      put_result(sums[d * W + lane] * inverse, weight_scale, result[d]);
  }
  return are_finite<W>(sums, in.dim * W);
}

// -- a row by itself ------------------------------------------------------------------------------

// Products of a query with kCount keys, each as the sum of W / kCount neighbouring lanes.
template <int W, int kCount>
NABLA_FAST_INLINE Floats<W> products(const float* query, const float* const* keys, int64_t dim) {
  if constexpr (kCount == 1) {
    Floats<W> sum = load<W>(query) * load<W>(keys[0]);
    for (int64_t d = W; d < dim; d += W) sum += load<W>(query + d) * load<W>(keys[0] + d);
    return sum;
  } else {
    return folded<W, W / kCount>(products<W, kCount / 2>(query, keys, dim),
                                 products<W, kCount / 2>(query, keys + kCount / 2, dim),
                                 std::make_integer_sequence<int, W>{});
  }
}

// State of a row by itself.
template <int W>
struct Row {
  alignas(64) float query[kMaxHeadDim], sums[kMaxHeadDim];
  int64_t first, position;  // of the keys that it sees
  float max, total;
  Ints<W> nan;
};

// sums += weights [count] values [count] [dim], after a multiplication with `rescale`. kDim: the
// width if it is known, else 0.
template <int W, int kDim>
NABLA_FAST_INLINE void add_values(const float* weights, const float* const* values, int64_t count,
                                  int64_t dim, Floats<W> rescale, float* sums) {
  // Values in turn go to kSets sums, so that their additions need not wait for each other.
  constexpr int kVectors = kDim ? kDim / W : 1,
                kSets = kVectors >= 8 ? 1 : std::min(8 / kVectors, 4);
  for (int64_t d = 0; d < dim; d += kVectors * W) {
    Floats<W> sum[kSets][kVectors] = {};
    int64_t j = 0;
    for (; j + kSets <= count; j += kSets) {
#pragma GCC unroll 4
      for (int set = 0; set < kSets; ++set) {
#pragma GCC unroll 32
        for (int n = 0; n < kVectors; ++n) {
          sum[set][n] += weights[j + set] * load<W>(values[j + set] + d + n * W);
        }
      }
    }
    for (; j < count; ++j) {
#pragma GCC unroll 32
      for (int n = 0; n < kVectors; ++n) sum[0][n] += weights[j] * load<W>(values[j] + d + n * W);
    }
#pragma GCC unroll 32
    for (int n = 0; n < kVectors; ++n) {
      Floats<W> joined = sum[0][n];
#pragma GCC unroll 4
      for (int set = 1; set < kSets; ++set) joined += sum[set][n];
      float* into = sums + d + n * W;
      store<W>(into, load<W>(into) * rescale + joined);
    }
  }
}

// All rows of a key-value head, each by itself, over one tile of keys after the other. kDim: the
// head's width if it is known, else 0; a multiple of W in either case. Returns whether sums are
// finite.
template <int W, int kDim>
NABLA_FAST_INLINE bool attend_rows_singly(const Call& call, int64_t batch, int64_t kv_head,
                                          float weight_scale) {
  const nabla_fast_attention_args& in = call.in;
  const int64_t dim = kDim ? kDim : in.dim, rows = call.rows();
  const Sequence keys = keys_of(in, batch, kv_head), values = values_of(in, batch, kv_head);
  const float scale = static_cast<float>(in.scale), cap = static_cast<float>(in.softcap);
  Row<W> row[kMaxSingleRows];
  for (int64_t r = 0; r < rows; ++r) {
    const float* query = call.query(batch, kv_head, r);
    for (int64_t d = 0; d < dim; d += W) {
      store<W>(row[r].query + d, load<W>(query + d));
      store<W>(row[r].sums + d, Floats<W>{});
    }
    row[r].position = keys.prefix + r / call.group;
    row[r].first = first_seen(in, row[r].position);
    // The sink is the first score of a row, if it has one.
    row[r].max = sink_of(in, kv_head * call.group + r % call.group);
    row[r].total = row[r].max > -kInfinity ? 1 : 0;
    row[r].nan = splat<W>(row[r].max) != splat<W>(row[r].max);
  }

  alignas(64) float s[kKeysPerTile];
  // The last key is repeated for lanes that are left over.
  const float *key[kKeysPerTile + W], *value[kKeysPerTile];
  const int64_t end = keys.prefix + (rows - 1) / call.group + 1;
  for (int64_t begin = first_seen(in, keys.prefix); begin < end; begin += kKeysPerTile) {
    const int64_t stop = std::min(begin + kKeysPerTile, end);
    keys.find(begin, stop, key);
    values.find(begin, stop, value);
    for (int lane = 0; lane < W; ++lane) key[stop - begin + lane] = key[stop - begin - 1];
    for (int64_t r = 0; r < rows; ++r) {
      Row<W>& mine = row[r];
      const int64_t offset = std::max(mine.first - begin, int64_t{0});
      const int64_t count = std::min(mine.position + 1, stop) - begin - offset;
      if (count <= 0) continue;
      const int64_t padded = (count + W - 1) / W * W;
      for (int64_t j = 0; j < padded; j += W) {
        store<W>(s + j, products<W, W>(mine.query, key + offset + j, dim) * scale);
      }
      if (cap > 0) cap_scores<W>(s, padded, cap);
      for (int64_t j = count; j < padded; ++j) s[j] = -kInfinity;
      Floats<W> highest = splat<W>(mine.max);
      for (int64_t j = 0; j < padded; j += W) {
        const Floats<W> score = load<W>(s + j);
        highest = score > highest ? score : highest;
      }
      const float max = lane_max<W>(highest), base = max > -kInfinity ? max : 0;
      const Floats<W> rescale = exp_of_negative<W>(splat<W>(mine.max - base), mine.nan);
      Floats<W> total = {};
      for (int64_t j = 0; j < padded; j += W) {
        const Floats<W> e = exp_of_negative<W>(load<W>(s + j) - base, mine.nan);
        store<W>(s + j, e * weight_scale);
        total += e;
      }
      mine.max = max;
      mine.total = mine.total * rescale[0] + lane_sum<W>(total);
      add_values<W, kDim>(s, value + offset, count, dim, rescale, mine.sums);
    }
  }
  bool finite = true;
  for (int64_t r = 0; r < rows; ++r) {
    const float sum = any_lane<W>(row[r].nan) ? kNaN : row[r].total;
    const float inverse = 1 / (weight_scale * sum);
    call.put_logsumexp(batch, kv_head, r, row[r].max, sum);
    float* result = call.result(batch, kv_head, r);
    if (weight_scale == 1)
      for (int64_t d = 0; d < dim; d += W) store<W>(result + d, load<W>(row[r].sums + d) * inverse);
    else
      for (int64_t d = 0; d < dim; ++d)
        put_result(row[r].sums[d] * inverse, weight_scale, result[d]);
    finite = finite && are_finite<W>(row[r].sums, dim);
  }
  return finite;
}

// True if the rows of a head are too few to go into lanes, by the vector operations for a key.
template <int W>
constexpr bool are_few(int64_t rows, int64_t dim) {
  return dim % W == 0 && rows <= kMaxSingleRows &&
         rows * (2 * dim / W + 4) < (rows + W - 1) / W * 2 * dim;
}

// -- units of work --------------------------------------------------------------------------------

// A call falls into units that touch nothing in common: a head's rows together where they are few,
// W of them otherwise.
template <int W>
NABLA_FAST_INLINE int64_t units_of_head_kernel(const Call& call) {
  return are_few<W>(call.rows(), call.in.dim) ? 1 : (call.rows() + W - 1) / W;
}

// A pass over the keys of a unit. Returns whether sums are finite.
template <int W>
NABLA_FAST_INLINE bool pass_unit(const Call& call, int64_t unit, float weight_scale) {
  const int64_t of_head = units_of_head_kernel<W>(call), head = unit / of_head;
  const int64_t batch = head / call.in.kv_heads, kv_head = head % call.in.kv_heads;
  if (!are_few<W>(call.rows(), call.in.dim))
    return attend_rows_in_lanes<W>(call, batch, kv_head, unit % of_head * W, weight_scale);
  switch (call.in.dim) {
    case 16:
      return attend_rows_singly<W, 16>(call, batch, kv_head, weight_scale);
    case 32:
      return attend_rows_singly<W, 32>(call, batch, kv_head, weight_scale);
    case 64:
      return attend_rows_singly<W, 64>(call, batch, kv_head, weight_scale);
    case 128:
      return attend_rows_singly<W, 128>(call, batch, kv_head, weight_scale);
    default:
      return attend_rows_singly<W, 0>(call, batch, kv_head, weight_scale);
  }
}

template <int W>
NABLA_FAST_INLINE void attend_kernel(const Call& call, int64_t unit) {
  for (const float weight_scale : kWeightScales)
    if (pass_unit<W>(call, unit, weight_scale)) return;
}

NABLA_FAST_FOR_EACH_ISA(attend, attend_kernel<W>)
NABLA_FAST_FOR_EACH_ISA(units_of_head, units_of_head_kernel<W>)

}  // namespace
}  // namespace nabla_fast::attention

using namespace nabla_fast;
using namespace nabla_fast::attention;

nabla_fast_status nabla_fast_prefix_attention(const nabla_fast_attention_args* args) {
  nabla_fast_attention_args in;
  if (const auto refused = read_args(args, in)) return refused;
  if (const auto refused = check_attention(in)) return refused;
  if (has_no_queries(in)) return NABLA_FAST_OK;
  if (const auto refused = check_heads(in, in.output, in.heads)) return refused;
  const int64_t queries = in.batch * in.heads * in.suffix;
  const bool overlap = any_overlap([&](auto& arrays) {
    arrays.writes(heads_array(in, in.output, in.heads));
    if (in.logsumexp) arrays.writes(array_of(in.logsumexp, queries));
    list_inputs(in, arrays);
  });
  if (overlap) return NABLA_FAST_OVERLAP;

  const Call call{in, in.heads / in.kv_heads};
  const nabla_fast_isa isa = nabla_fast_cpu_isa();
  auto* const run = attend.select(isa);
  const int64_t units = in.batch * in.kv_heads * units_of_head.select(isa)(call);
  const int threads =
      threads_for((Size(2) * attention_work(in)).or_most(), kWorkPerThread, in.num_threads);
  if (threads == 1) {
    for (int64_t unit = 0; unit < units; ++unit) run(call, unit);
    return NABLA_FAST_OK;
  }
#pragma omp parallel for num_threads(threads) schedule(dynamic)
  for (int64_t unit = 0; unit < units; ++unit) run(call, unit);
  return NABLA_FAST_OK;
}
