// nabla_fast_prefix_attention_backward: probabilities are computed again, the prefix gets no
// gradient.
//
// With p = softmax(s), s = scale q k, and dp = cotangent v, the gradient of a score is p (dp -
// delta), delta = sum over all keys of p dp. A first sweep has queries in its lanes: it finds
// delta, the maximum and the sum of exponentials, and ends with dq. A second one has the suffix's
// keys in its lanes and goes through the queries that see them, for dk and dv. So every result
// belongs to one thread.

#include <cmath>

#include "base/floats.h"
#include "ops/prefix_attention.h"

namespace nabla_fast::attention {
namespace {

// Multiplications worth another thread.
constexpr int64_t kWorkPerThread = int64_t{1} << 20;

// Softmax of a query: p = exp(s - max) * inverse.
struct Softmax {
  float max, inverse, delta;
};

struct Call {
  const nabla_fast_attention_args& in;
  int64_t group;       // query heads of a key-value head
  int64_t most_keys;   // of a query
  Softmax* softmaxes;  // [batch, kv_heads, suffix * group]
  float* scratches;    // [threads, 2, most_keys, W]; [threads, 3, most_keys, W] of capped scores

  // Row n of a key-value head is token n / group and head n mod group of its group.
  int64_t rows() const { return group * in.suffix; }
  const float* query(int64_t batch, int64_t kv_head, int64_t row) const {
    return token_of(in.q, batch, kv_head * group + row % group, row / group);
  }
  const float* upstream(int64_t batch, int64_t kv_head, int64_t row) const {
    return token_of(in.cotangent, batch, kv_head * group + row % group, row / group);
  }
  Softmax* softmax(int64_t batch, int64_t kv_head) const {
    return softmaxes + (batch * in.kv_heads + kv_head) * rows();
  }
};

template <int W>
NABLA_FAST_INLINE void put_lane(const float* row, int64_t dim, int lane, float* rows) {
  for (int64_t d = 0; d < dim; ++d) rows[d * W + lane] = row[d];
}

// Sum of e dp, with e times `scale`.
template <int W>
NABLA_FAST_INLINE Floats<W> weighted_sum(const float* e, const float* dp, int64_t count,
                                         float scale) {
  Floats<W> sum = {};
  for (int64_t begin = 0; begin < count; begin += kKeysPerTile) {
    Floats<W> of_tile = {};
    for (int64_t t = begin; t < std::min(begin + kKeysPerTile, count); ++t) {
      const Floats<W> weight = load<W>(e + t * W);
      of_tile += weight == 0.0f ? Floats<W>{} : weight * scale * load<W>(dp + t * W);
    }
    sum += of_tile;
  }
  return sum;
}

template <int W>
NABLA_FAST_INLINE void take_lane(const float* rows, int64_t dim, int lane, float* row) {
  for (int64_t d = 0; d < dim; ++d) row[d] = rows[d * W + lane];
}

// Gradients of capped scores become those of the scores. A gradient of 0 stays 0: the key may be one
// that nobody sees, and its slope NaN.
template <int W>
NABLA_FAST_INLINE void times_slopes(const float* slopes, int64_t count, float* ds) {
  for (int64_t n = 0; n < count; n += W) {
    const Floats<W> gradient = load<W>(ds + n);
    store<W>(ds + n, gradient == 0.0f ? gradient : gradient * load<W>(slopes + n));
  }
}

// dq of the rows from `first` on, as many as there are lanes, and their softmaxes.
template <int W>
NABLA_FAST_INLINE void query_sweep(const Call& call, int64_t batch, int64_t kv_head, int64_t first,
                                   float* scratch) {
  const nabla_fast_attention_args& in = call.in;
  const Sequence keys = keys_of(in, batch, kv_head), values = values_of(in, batch, kv_head);
  const float scale = static_cast<float>(in.scale), cap = static_cast<float>(in.softcap);
  const int64_t last = std::min(first + W, call.rows()) - 1;
  alignas(64) float q[kMaxHeadDim * W], upstream[kMaxHeadDim * W];
  const float* others[kKeysPerTile];
  Ints<W> position, lowest;
  Floats<W> sink = {};
  for (int lane = 0; lane < W; ++lane) {
    const int64_t row = std::min(first + lane, last);
    sink[lane] = sink_of(in, kv_head * call.group + row % call.group);
    put_lane<W>(call.query(batch, kv_head, row), in.dim, lane, q);
    put_lane<W>(call.upstream(batch, kv_head, row), in.dim, lane, upstream);
    position[lane] = static_cast<int32_t>(keys.prefix + row / call.group);
    lowest[lane] = static_cast<int32_t>(first_seen(in, position[lane]));
  }
  const int64_t start = lowest[0], end = position[W - 1] + 1;
  float *const s = scratch, *const dp = s + call.most_keys * W;
  float* const slopes = dp + call.most_keys * W;

  Floats<W> max = sink;
  for (int64_t begin = start; begin < end; begin += kKeysPerTile) {
    const int64_t count = std::min(kKeysPerTile, end - begin);
    float* const tile = s + (begin - start) * W;
    keys.find(begin, begin + count, others);
    scores<W>(others, count, q, in.dim, scale, tile);
    if (cap > 0) {
      cap_scores<W>(tile, count * W, cap);
      slopes_of<W>(tile, count * W, cap, slopes + (begin - start) * W);
    }
    if (begin < lowest[W - 1] || begin + count - 1 > position[0]) {
      for (int64_t j = 0; j < count; ++j) {
        const int32_t t = static_cast<int32_t>(begin + j);
        const Ints<W> seen = (t <= position) & (t >= lowest);
        store<W>(tile + j * W, seen ? load<W>(tile + j * W) : splat<W>(-kInfinity));
      }
    }
    for (int64_t j = 0; j < count; ++j) {
      const Floats<W> score = load<W>(tile + j * W);
      max = score > max ? score : max;
    }
    values.find(begin, begin + count, others);
    scores<W>(others, count, upstream, in.dim, 1, dp + (begin - start) * W);
  }

  Ints<W> nan = max != max;
  Floats<W> total = exp_of_negative<W>(sink - max, nan);
  for (int64_t begin = start; begin < end; begin += kKeysPerTile) {
    Floats<W> tile_total = {};
    for (int64_t t = begin - start; t < std::min(begin + kKeysPerTile, end) - start; ++t) {
      const Floats<W> e = exp_of_negative<W>(load<W>(s + t * W) - max, nan);
      store<W>(s + t * W, e);
      tile_total += e;
    }
    total += tile_total;
  }
  const Floats<W> inverse = nan ? splat<W>(kNaN) : 1.0f / total;
  Floats<W> delta = weighted_sum<W>(s, dp, end - start, 1) * inverse;
  const Floats<W> nothing = delta - delta;  // 0 where delta is finite
  if (lane_sum<W>(nothing) != 0) {
    const Floats<W> small = weighted_sum<W>(s, dp, end - start, kSmallScale);
    delta = nothing == 0.0f ? delta : small * (inverse / kSmallScale);
  }

  alignas(64) float weights[kKeysPerTile * W];
  std::fill(q, q + in.dim * W, 0.0f);  // becomes dq
  for (int64_t begin = start; begin < end; begin += kKeysPerTile) {
    const int64_t count = std::min(kKeysPerTile, end - begin);
    for (int64_t j = 0; j < count; ++j) {
      const int64_t t = begin - start + j;
      const Floats<W> p = load<W>(s + t * W) * inverse;
      const Floats<W> ds = scale * p * (load<W>(dp + t * W) - delta);
      store<W>(weights + j * W, p == 0.0f ? Floats<W>{} : ds);
    }
    if (cap > 0) times_slopes<W>(slopes + (begin - start) * W, count * W, weights);
    keys.find(begin, begin + count, others);
    accumulate<W>(others, count, weights, in.dim, q);
  }
  for (int lane = 0; first + lane <= last; ++lane) {
    const int64_t row = first + lane;
    const int64_t head = kv_head * call.group + row % call.group;
    take_lane<W>(q, in.dim, lane, token_of(in.dq, batch, head, row / call.group));
    call.softmax(batch, kv_head)[row] = {max[lane], inverse[lane], delta[lane]};
  }
}

// dk and dv of the suffix's tokens from `first` on, as many as there are lanes.
template <int W>
NABLA_FAST_INLINE void key_sweep(const Call& call, int64_t batch, int64_t kv_head, int64_t first,
                                 float*) {
  const nabla_fast_attention_args& in = call.in;
  const float scale = static_cast<float>(in.scale), cap = static_cast<float>(in.softcap);
  const int64_t last = std::min(first + W, in.suffix) - 1;
  const Softmax* const softmax = call.softmax(batch, kv_head);
  alignas(64) float k[kMaxHeadDim * W], v[kMaxHeadDim * W], dk[kMaxHeadDim * W],
      dv[kMaxHeadDim * W];
  alignas(64) float s[kKeysPerTile * W], dp[kKeysPerTile * W], slopes[kKeysPerTile * W];
  const float *queries[kKeysPerTile], *upstreams[kKeysPerTile];
  Ints<W> token;
  for (int lane = 0; lane < W; ++lane) {
    token[lane] = static_cast<int32_t>(std::min(first + lane, last));
    put_lane<W>(token_of(in.k, batch, kv_head, token[lane]), in.dim, lane, k);
    put_lane<W>(token_of(in.v, batch, kv_head, token[lane]), in.dim, lane, v);
  }
  std::fill(dk, dk + in.dim * W, 0.0f);
  std::fill(dv, dv + in.dim * W, 0.0f);
  Ints<W> nan = {};

  const bool cut = in.window > 0 && in.window < in.suffix;
  const int64_t stop = cut ? std::min(last + in.window, in.suffix) : in.suffix;
  for (int64_t begin = first * call.group; begin < stop * call.group; begin += kKeysPerTile) {
    const int64_t count = std::min(kKeysPerTile, stop * call.group - begin);
    for (int64_t j = 0; j < count; ++j) {
      queries[j] = call.query(batch, kv_head, begin + j);
      upstreams[j] = call.upstream(batch, kv_head, begin + j);
    }
    scores<W>(queries, count, k, in.dim, scale, s);
    if (cap > 0) {
      cap_scores<W>(s, count * W, cap);
      slopes_of<W>(s, count * W, cap, slopes);
    }
    scores<W>(upstreams, count, v, in.dim, 1, dp);
    for (int64_t j = 0; j < count; ++j) {
      const Softmax& row = softmax[begin + j];
      const int64_t query = (begin + j) / call.group;
      const int32_t position = static_cast<int32_t>(query);
      const int32_t lowest = static_cast<int32_t>(first_seen(in, query));
      const Ints<W> seen = (token <= position) & (token >= lowest);
      // Unseen keys may have s - max above 0.
      const Floats<W> x = seen ? load<W>(s + j * W) - row.max : splat<W>(-kInfinity);
      const Floats<W> p = exp_of_negative<W>(x, nan) * row.inverse;
      const Floats<W> ds = scale * p * (load<W>(dp + j * W) - row.delta);
      store<W>(s + j * W, seen ? p : Floats<W>{});
      store<W>(dp + j * W, (seen & (p != 0.0f)) ? ds : Floats<W>{});
    }
    if (cap > 0) times_slopes<W>(slopes, count * W, dp);
    accumulate<W>(upstreams, count, s, in.dim, dv);
    accumulate<W>(queries, count, dp, in.dim, dk);
  }
  for (int lane = 0; first + lane <= last; ++lane) {
    take_lane<W>(dk, in.dim, lane, token_of(in.dk, batch, kv_head, first + lane));
    take_lane<W>(dv, in.dim, lane, token_of(in.dv, batch, kv_head, first + lane));
  }
}

template <int W>
NABLA_FAST_INLINE int64_t lanes_kernel() {
  return W;
}

NABLA_FAST_FOR_EACH_ISA(sweep_queries, query_sweep<W>)
NABLA_FAST_FOR_EACH_ISA(sweep_keys, key_sweep<W>)
NABLA_FAST_FOR_EACH_ISA(lanes_of, lanes_kernel<W>)

using Sweep = void(const Call& call, int64_t batch, int64_t kv_head, int64_t first, float* scratch);

constexpr int64_t kMaxLanes = 16;

// Numbers of a key and a query that a thread keeps: weight, dp and, where scores are capped, slope.
int64_t parts_of(const nabla_fast_attention_args& in) { return in.softcap > 0 ? 3 : 2; }

// The sweep over all of `count` rows or tokens of every key-value head, `lanes` at a time.
void sweep_all(const Call& call, Sweep* sweep, int64_t count, int64_t lanes, int threads) {
  const int64_t of_head = (count + lanes - 1) / lanes;
  const int64_t units = call.in.batch * call.in.kv_heads * of_head;
  const int64_t scratch = parts_of(call.in) * call.most_keys * kMaxLanes;
  const auto run = [&](int64_t unit, int thread) {
    const int64_t head = unit / of_head;
    sweep(call, head / call.in.kv_heads, head % call.in.kv_heads, unit % of_head * lanes,
          call.scratches + thread * scratch);
  };
  if (threads == 1) {
    for (int64_t unit = 0; unit < units; ++unit) run(unit, 0);
    return;
  }
#ifdef _OPENMP
  #pragma omp parallel for num_threads(threads) schedule(dynamic)
  for (int64_t unit = 0; unit < units; ++unit) run(unit, thread_rank());
#endif
}

struct Layout {
  int threads;
  int64_t most_keys, softmax_bytes, bytes;  // bytes: 0 if they are too many

  explicit Layout(const nabla_fast_attention_args& in) {
    threads = threads_for((Size(4) * attention_work(in)).or_most(), kWorkPerThread, in.num_threads);
    most_keys = 0;
    for (int64_t b = 0; b < in.batch; ++b) most_keys = std::max(most_keys, in.prefix_lengths[b]);
    // The product with a tile's keys writes whole groups of 8.
    most_keys = (most_keys + in.suffix + 7) / 8 * 8;
    const auto size = static_cast<int64_t>(sizeof(Softmax));
    softmax_bytes = (Size(in.batch) * in.heads * in.suffix * size).rounded_up(64).or_most();
    const auto element = static_cast<int64_t>(sizeof(float));
    const Size scratches = Size(threads) * parts_of(in) * most_keys * kMaxLanes * element;
    bytes = (kAlignment + Size(softmax_bytes) + scratches).or_zero();
  }
};

}  // namespace
}  // namespace nabla_fast::attention

using namespace nabla_fast;
using namespace nabla_fast::attention;

int64_t nabla_fast_prefix_attention_backward_workspace(const nabla_fast_attention_args* args) {
  return workspace_bytes(args, check_attention, [](const nabla_fast_attention_args& in) {
    return has_no_queries(in) ? 0 : Layout(in).bytes;
  });
}

nabla_fast_status nabla_fast_prefix_attention_backward(const nabla_fast_attention_args* args) {
  nabla_fast_attention_args in;
  if (const auto refused = read_args(args, in)) return refused;
  if (const auto refused = check_attention(in)) return refused;
  if (has_no_queries(in)) return NABLA_FAST_OK;
  if (const auto refused = check_heads(in, in.cotangent, in.heads)) return refused;
  if (const auto refused = check_heads(in, in.dq, in.heads)) return refused;
  if (const auto refused = check_heads(in, in.dk, in.kv_heads)) return refused;
  if (const auto refused = check_heads(in, in.dv, in.kv_heads)) return refused;
  const Layout layout(in);
  if (const auto refused = check_workspace(in, layout.bytes)) return refused;
  const bool overlap = any_overlap([&](auto& arrays) {
    arrays.writes(heads_array(in, in.dq, in.heads));
    arrays.writes(heads_array(in, in.dk, in.kv_heads));
    arrays.writes(heads_array(in, in.dv, in.kv_heads));
    arrays.writes(array_of_bytes(in.workspace, layout.bytes));
    arrays.reads(heads_array(in, in.cotangent, in.heads));
    list_inputs(in, arrays);
  });
  if (overlap) return NABLA_FAST_OVERLAP;

  char* const memory = aligned(in.workspace);
  const Call call{in, in.heads / in.kv_heads, layout.most_keys, reinterpret_cast<Softmax*>(memory),
                  reinterpret_cast<float*>(memory + layout.softmax_bytes)};
  const nabla_fast_isa isa = nabla_fast_cpu_isa();
  const int64_t lanes = lanes_of.select(isa)();
  sweep_all(call, sweep_queries.select(isa), call.rows(), lanes, layout.threads);
  sweep_all(call, sweep_keys.select(isa), in.suffix, lanes, layout.threads);
  return NABLA_FAST_OK;
}
