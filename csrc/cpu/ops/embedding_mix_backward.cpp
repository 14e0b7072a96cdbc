// nabla_fast_embedding_mix_backward: through the softmax's Jacobian to logits or hidden states.
//
// G is taken relative to that of the hard token: where p is nearly one-hot, G[token] - <p, G> is a
// difference of nearly equal numbers.
//
// To logits: the largest y of each row first, which is a pass over memory; then G by tiles, and
// with it <p, G>; then dz. Between the two, G is kept in the place of dz if that is float32; else
// it is computed twice.
//
// To hidden states: dz head = sum e (G - c - mean) w / (tau sum e) over rows w of the head. y and G
// are kept between the passes: a product more would take longer than their memory. y is the forward's
// where the caller has kept it. Where the sums
// overflow all is done again, with kSmallScale.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>

#include "base/check.h"
#include "base/floats.h"
#include "base/isa.h"
#include "base/threads.h"
#include "nabla_fast.h"
#include "ops/embedding_mix_call.h"
#include "ops/embedding_mix_sums.h"
#include "simd/bf16.h"

namespace nabla_fast::mix {
namespace {

// Multiply-adds worth another thread.
constexpr int64_t kWorkPerThread = int64_t{1} << 21;

int threads_of(const nabla_fast_mix_args& call) {
  Size width = is_linear(call) ? Size(call.head.width) * 3 : Size(0);
  for (int64_t t = 0; t < call.table_count; ++t) width = width + call.tables[t].width;
  const Size work =
      (width + 16) * call.vocab * (std::min<int64_t>(call.rows, gemm::kRowsPerGroup) + 4);
  return static_cast<int>(std::min<int64_t>(
      threads_for(work.or_most(), kWorkPerThread, call.num_threads), mix_segments(call.vocab)));
}

// -- to logits ------------------------------------------------------------------------------------

// Numbers of a group's whole rows.
struct Rows {
  alignas(64) float max[gemm::kRowsPerGroup];
  alignas(64) float centre[gemm::kRowsPerGroup];
  alignas(64) float mean[gemm::kRowsPerGroup];    // <p, G - c>
  alignas(64) float weight[gemm::kRowsPerGroup];  // 1 / (tau sum e)
};

void pick_centres(const Cotangents& cotangents, int rows, const softmax::Top* tops, Rows& of) {
  alignas(64) float grad[gemm::kRowsPerGroup];
  for (int r = 0; r < rows; ++r) {
    of.max[r] = tops[r].max;
    if (tops[r].token < 0) continue;
    cotangents.gradient(tops[r].token, 1, grad);
    of.centre[r] = grad[r];
  }
}

// Means and weights of whole rows, from the sums of their segments.
void join_sums(const softmax::Sums* sums, int64_t segments, int rows, double tau, Rows& of) {
  for (int r = 0; r < rows; ++r) {
    double sum = 0, weighted_grad = 0;
    for (int64_t segment = 0; segment < segments; ++segment) {
      sum += sums[segment].e[r];
      weighted_grad += sums[segment].weighted_grad_sum[r];
    }
    of.mean[r] = static_cast<float>(weighted_grad / sum);
    of.weight[r] = static_cast<float>(1 / (sum * tau));
  }
}

struct Output {
  void* grad;
  nabla_fast_dtype dtype;
  int64_t stride;

  Output from(int64_t row) const {
    return {static_cast<char*>(grad) + row * stride * bytes_of(dtype), dtype, stride};
  }
  void store(const float* tile, int rows, int64_t token, int tokens) const {
    softmax::store_tile(tile, rows, token, tokens, grad, dtype, stride);
  }
  void fill_nan(int64_t row, int64_t vocab) const {
    for (int64_t v = 0; v < vocab; ++v) {
      if (dtype == NABLA_FAST_FLOAT32)
        static_cast<float*>(grad)[row * stride + v] = kNaN;
      else
        static_cast<uint16_t*>(grad)[row * stride + v] = kBf16NaN;
    }
  }
};

// dz by tiles, computing G a second time.
void write_grad(const RowGroup& group, const Cotangents& cotangents, const Rows& of,
                const Output& out, int threads) {
  const nabla_fast_mix_args& call = group.call;
  const int rows = group.rows, lanes = gemm::lanes_of(rows);
#pragma omp parallel for schedule(dynamic) num_threads(threads) if (threads > 1)
  for (int64_t segment = 0; segment < mix_segments(call.vocab); ++segment) {
    alignas(64) float y[softmax::kTileFloats], grad[softmax::kTileFloats];
    for_each_segment_tile(segment, call.vocab, [&](int64_t token, int tokens) {
      cotangents.gradient(token, tokens, grad);
      for (int t = 0; t < tokens; ++t)
        for (int r = 0; r < lanes; ++r) grad[t * lanes + r] -= of.centre[r];
      group.load(token, tokens, y);
      softmax::softmax_jacobian(y, grad, rows, tokens, of.max, of.mean, of.weight, call.tau);
      out.store(grad, rows, token, tokens);
    });
  }
}

void logits_group(const RowGroup& group, const Cotangents& cotangents, const Output& out,
                  int threads, char* memory) {
  const nabla_fast_mix_args& call = group.call;
  const int64_t segments = mix_segments(call.vocab);
  const int rows = group.rows;
  auto* sums = reinterpret_cast<softmax::Sums*>(memory);
  softmax::Top tops[gemm::kRowsPerGroup];
  const gemm::Table logits = gemm::table_of(call.logits, call.rows).from(group.first);
  const softmax::NoiseKeys keys = keys_from(call, group.first);
  softmax::tops_of_rows(logits, rows, call.vocab, keys, call.num_threads,
                        reinterpret_cast<softmax::Top*>(memory), tops);
  Rows of = {};
  pick_centres(cotangents, rows, tops, of);
  const bool waits = out.dtype == NABLA_FAST_FLOAT32;
#pragma omp parallel for schedule(dynamic) num_threads(threads) if (threads > 1)
  for (int64_t segment = 0; segment < segments; ++segment) {
    alignas(64) float y[softmax::kTileFloats], grad[softmax::kTileFloats];
    sums[segment].clear();
    for_each_segment_tile(segment, call.vocab, [&](int64_t token, int tokens) {
      cotangents.gradient(token, tokens, grad);
      group.load(token, tokens, y);
      softmax::weighted_grad_sum(y, grad, rows, tokens, of.max, of.centre, call.tau, sums[segment]);
      if (waits) out.store(grad, rows, token, tokens);
    });
  }
  join_sums(sums, segments, rows, call.tau, of);
  if (waits) {
    softmax::JacobianRow of_rows[gemm::kRowsPerGroup];
    for (int r = 0; r < rows; ++r) of_rows[r] = {of.max[r], of.mean[r], of.weight[r]};
    softmax::jacobian_of_rows(logits, rows, call.vocab, keys, of_rows, call.tau,
                              static_cast<float*>(out.grad), out.stride, call.num_threads);
  } else {
    write_grad(group, cotangents, of, out, threads);
  }
  for (int r = 0; r < rows; ++r) {
    call.row_status[group.first + r] = tops[r].status();
    if (call.row_status[group.first + r] != NABLA_FAST_OK) out.fill_nan(r, call.vocab);
  }
}

// -- to hidden states -----------------------------------------------------------------------------

// Factors of the weights and of G in a pass.
struct Scales {
  float weights, grad;
};
constexpr Scales kPlain{1, 1};
// Two G near the largest number have a difference too.
constexpr Scales kSmall{kSmallScale, 0.25f};

// A group's y and G of the whole vocabulary, by tiles [tokens, lanes], and what its segments find.
struct Kept {
  float* y;  // e, once the maxima are known
  float* grad;
  softmax::Tops* tops;
  softmax::Sums* sums;
  float* mixes;  // of all segments so far and of those computed at once: [rows, padded(width)] each

  static Size tile_bytes(const nabla_fast_mix_args& call) {
    const auto rows = static_cast<int>(std::min<int64_t>(call.rows, gemm::kRowsPerGroup));
    return (Size(call.vocab) * (4 * gemm::lanes_of(rows))).rounded_up(kAlignment);
  }
  static Size segment_bytes(const nabla_fast_mix_args& call, size_t size) {
    return (Size(mix_segments(call.vocab)) * static_cast<int64_t>(size)).rounded_up(kAlignment);
  }
  static Size mix_bytes(const nabla_fast_mix_args& call) {
    return Size(call.head.width).rounded_up(16) *
           (4 * std::min<int64_t>(call.rows, gemm::kRowsPerGroup));
  }
  static Size bytes(const nabla_fast_mix_args& call) {
    return tile_bytes(call) * 2 + segment_bytes(call, sizeof(softmax::Tops)) +
           segment_bytes(call, sizeof(softmax::Sums)) + mix_bytes(call) * (threads_of(call) + 1);
  }

  Kept(const nabla_fast_mix_args& call, char* memory) {
    const auto take = [&](Size bytes) {
      char* const begin = memory;
      memory += bytes.or_zero();
      return begin;
    };
    y = reinterpret_cast<float*>(take(tile_bytes(call)));
    grad = reinterpret_cast<float*>(take(tile_bytes(call)));
    tops = reinterpret_cast<softmax::Tops*>(take(segment_bytes(call, sizeof(softmax::Tops))));
    sums = reinterpret_cast<softmax::Sums*>(take(segment_bytes(call, sizeof(softmax::Sums))));
    mixes = reinterpret_cast<float*>(memory);
  }
};

// Both products of tiles, and the maxima of segments.
void multiply(const RowGroup& group, const Cotangents& cotangents, float scale, int threads,
              const Kept& kept) {
  const nabla_fast_mix_args& call = group.call;
  const int rows = group.rows, lanes = gemm::lanes_of(rows);
#pragma omp parallel for schedule(dynamic) num_threads(threads) if (threads > 1)
  for (int64_t segment = 0; segment < mix_segments(call.vocab); ++segment) {
    float factor[gemm::kRowsPerGroup];
    kept.tops[segment].clear();
    for_each_segment_tile(segment, call.vocab, [&](int64_t token, int tokens) {
      float* const y = kept.y + token * lanes;
      float* const grad = kept.grad + token * lanes;
      group.load_kept(token, tokens, y);
      cotangents.gradient(token, tokens, grad);
      scale_tile(grad, rows, tokens, scale);
      softmax::update_max(y, rows, token, tokens, call.tau, kept.tops[segment], factor);
    });
  }
}

// Maxima of whole rows, their statuses, and G of their hard tokens as centres.
void join_tops(const RowGroup& group, const Kept& kept, Rows& of) {
  const nabla_fast_mix_args& call = group.call;
  for (int r = 0; r < group.rows; ++r) {
    softmax::Top top;
    for (int64_t segment = 0; segment < mix_segments(call.vocab); ++segment) {
      const softmax::Tops& tops = kept.tops[segment];
      top.join({tops.max[r], tops.token[r], tops.nan[r] != 0});
    }
    of.max[r] = top.max;
    if (top.token >= 0) of.centre[r] = kept.grad[top.token * gemm::lanes_of(group.rows) + r];
    call.row_status[group.first + r] = top.status();
  }
}

// y = e and G = G - c, and with their sums the means.
void centre_tiles(const RowGroup& group, int threads, const Kept& kept, Rows& of) {
  const nabla_fast_mix_args& call = group.call;
  const int rows = group.rows, lanes = gemm::lanes_of(rows);
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1)
  for (int64_t segment = 0; segment < mix_segments(call.vocab); ++segment) {
    kept.sums[segment].clear();
    for_each_segment_tile(segment, call.vocab, [&](int64_t token, int tokens) {
      softmax::weighted_grad_sum(kept.y + token * lanes, kept.grad + token * lanes, rows, tokens,
                                 of.max, of.centre, call.tau, kept.sums[segment]);
    });
  }
  join_sums(kept.sums, mix_segments(call.vocab), rows, call.tau, of);
}

// Sums of e (G - c - mean) times the head's rows, in the first of `kept.mixes`.
void mix_head(const RowGroup& group, float scale, int threads, const Rows& of, const Kept& kept) {
  const nabla_fast_mix_args& call = group.call;
  const gemm::Table head = gemm::table_of(call.head, call.vocab);
  const int rows = group.rows, lanes = gemm::lanes_of(rows);
  const int64_t width = padded(head.width), floats = rows * width;
  float* const total = kept.mixes;
  std::fill_n(total, floats, 0.0f);
  in_rounds(
      mix_segments(call.vocab), rows, threads,
      [&](int64_t segment, int64_t n) {
        float* const part = total + (n + 1) * floats;
        std::fill_n(part, floats, 0.0f);
        for_each_segment_tile(segment, call.vocab, [&](int64_t token, int tokens) {
          alignas(64) float weights[softmax::kTileFloats];
          for (int t = 0; t < tokens; ++t) {
            const int64_t at = (token + t) * lanes;
            for (int r = 0; r < lanes; ++r)
              weights[t * lanes + r] = kept.y[at + r] * (kept.grad[at + r] - of.mean[r]) * scale;
          }
          gemm::add_weighted_sums(weights, lanes, rows, head.from(token), tokens, part);
        });
      },
      [&](int row, int64_t n) {
        const float* const part = total + (n + 1) * floats + row * width;
        for (int64_t k = 0; k < width; ++k) total[row * width + k] += part[k];
      });
}

float* grad_row(const nabla_fast_mix_args& call, int64_t row) {
  return static_cast<float*>(call.grad.data) + row * stride_of(call.grad, call.rows);
}

// Calls visit(gradient, element) for every element of the group's hidden states whose rows are OK.
template <typename Visit>
void for_each_gradient(const RowGroup& group, const Cotangents& cotangents, const Scales& scales,
                       int threads, const Kept& kept, const Visit& visit) {
  const nabla_fast_mix_args& call = group.call;
  const int64_t width = call.head.width;
  Rows of = {};
  multiply(group, cotangents, scales.grad, threads, kept);
  join_tops(group, kept, of);
  centre_tiles(group, threads, kept, of);
  mix_head(group, scales.weights, threads, of, kept);
  const float rest = 1 / (scales.weights * scales.grad);  // a power of two
  for (int r = 0; r < group.rows; ++r) {
    if (call.row_status[group.first + r] != NABLA_FAST_OK) continue;
    float* const out = grad_row(call, group.first + r);
    const float* const mix = kept.mixes + r * padded(width);
    for (int64_t k = 0; k < width; ++k) visit(mix[k] * of.weight[r] * rest, out[k]);
  }
}

void hidden_group(const RowGroup& group, const Cotangents& cotangents, int threads, char* memory) {
  const nabla_fast_mix_args& call = group.call;
  const Kept kept(call, memory);
  bool finite = true;
  for_each_gradient(group, cotangents, kPlain, threads, kept, [&](float gradient, float& element) {
    element = gradient;
    finite = finite && std::isfinite(gradient);
  });
  for (int r = 0; r < group.rows; ++r)
    if (call.row_status[group.first + r] != NABLA_FAST_OK)
      std::fill_n(grad_row(call, group.first + r), call.head.width, kNaN);
  if (finite) return;
  for_each_gradient(group, cotangents, kSmall, threads, kept, [](float gradient, float& element) {
    if (!std::isfinite(element) && std::isfinite(gradient)) element = gradient;
  });
}

// Bytes behind the hidden states and cotangents in the workspace.
Size sums_bytes(const nabla_fast_mix_args& call) {
  const int64_t rows = std::min<int64_t>(call.rows, gemm::kRowsPerGroup);
  if (is_linear(call)) return Kept::bytes(call);
  const Size tops = Size(softmax::top_parts(rows, call.vocab)) * sizeof(softmax::Top);
  const Size sums = Size(mix_segments(call.vocab)) * sizeof(softmax::Sums);
  return std::max(tops.or_most(), sums.or_most());
}

Size workspace_of(const nabla_fast_mix_args& call) {
  if (call.rows == 0) return 0;
  return RowGroup::hidden_bytes(call) + Cotangents::bytes(call) + sums_bytes(call) + kAlignment;
}

// OK, or why what the backward reads is refused.
nabla_fast_status check(const nabla_fast_mix_args& call) {
  if (const auto refused = check_mix(call)) return refused;
  if (call.rows == 0) return NABLA_FAST_OK;
  if (call.table_count > 0 && !call.cotangents) return NABLA_FAST_INVALID_POINTER;
  for (int64_t t = 0; t < call.table_count; ++t)
    if (const auto refused = check_matrix(call.cotangents[t], call.rows, call.tables[t].width))
      return refused;
  return call.direct.data ? check_matrix(call.direct, call.rows, call.vocab) : NABLA_FAST_OK;
}

nabla_fast_status check_grad(const nabla_fast_mix_args& call) {
  const bool linear = is_linear(call);
  const int64_t width = linear ? call.head.width : call.vocab;
  if (const auto refused = check_matrix(call.grad, call.rows, width)) return refused;
  if (call.grad.dtype != (linear ? NABLA_FAST_FLOAT32 : call.logits.dtype))
    return NABLA_FAST_UNKNOWN_DTYPE;
  return call.row_status ? NABLA_FAST_OK : NABLA_FAST_INVALID_POINTER;
}

}  // namespace
}  // namespace nabla_fast::mix

using namespace nabla_fast;
using namespace nabla_fast::mix;

int64_t nabla_fast_embedding_mix_backward_workspace(const nabla_fast_mix_args* args) {
  return workspace_bytes(args, check, workspace_of);
}

nabla_fast_status nabla_fast_embedding_mix_backward(const nabla_fast_mix_args* args) {
  nabla_fast_mix_args call;
  if (const auto refused = read_args(args, call)) return refused;
  if (const auto refused = check(call)) return refused;
  if (call.rows == 0) return NABLA_FAST_OK;
  if (const auto refused = check_grad(call)) return refused;
  const int64_t bytes = workspace_of(call).or_zero();
  if (const auto refused = check_workspace(call, bytes)) return refused;
  const bool overlap = any_overlap([&](auto& arrays) {
    arrays.writes(array_of(call.grad, call.rows));
    arrays.writes(array_of(call.row_status, call.rows));
    arrays.writes(array_of_bytes(call.workspace, bytes));
    list_inputs(call, arrays);
    arrays.reads(perturbed_of(call));
    arrays.reads(array_of(call.cotangents, call.table_count));
    for (int64_t t = 0; t < call.table_count; ++t)
      arrays.reads(array_of(call.cotangents[t], call.rows));
    if (call.direct.data) arrays.reads(array_of(call.direct, call.rows));
  });
  if (overlap) return NABLA_FAST_OVERLAP;
  char* memory = aligned(call.workspace);
  Cotangents packed(call, memory + RowGroup::hidden_bytes(call).or_zero());
  char* sums = memory + (RowGroup::hidden_bytes(call) + Cotangents::bytes(call)).or_zero();
  const Output out{call.grad.data, call.grad.dtype, stride_of(call.grad, call.rows)};
  const int threads = threads_of(call);
  for (int64_t first = 0; first < call.rows; first += gemm::kRowsPerGroup) {
    const RowGroup group(call, first, memory);
    packed.pack(first, group.rows);
    if (is_linear(call))
      hidden_group(group, packed, threads, sums);
    else
      logits_group(group, packed, out.from(first), threads, sums);
  }
  return NABLA_FAST_OK;
}
