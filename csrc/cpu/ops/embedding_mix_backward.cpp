// nabla_fast_embedding_mix_backward: through the softmax's Jacobian to logits or hidden states.
//
// G is taken relative to that of the hard token: where p is nearly one-hot, G[token] - <p, G> is a
// difference of nearly equal numbers.
//
// To logits: the largest y of each row first, which is a pass over memory; then G by tiles, and
// with it <p, G>; then dz. Between the two, G is kept in the place of dz if that is float32; else
// it is computed twice.
//
// To hidden states: dz head = (sum e (G - c) w - mean sum e w) / (tau sum e) over rows w of the
// head, all in one pass. Both sums and c, the G of the hard token, follow the largest y so far.
// Where the sums overflow there is a second pass, with kSmallScale.

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
      softmax::weighted_grad_sum(y, grad, rows, tokens, of.max, of.centre, call.tau,
                                 softmax::GradTile::kCentred, sums[segment]);
      if (waits) out.store(grad, rows, token, tokens);
    });
  }
  for (int r = 0; r < rows; ++r) {
    double sum = 0, weighted_grad = 0;
    for (int64_t segment = 0; segment < segments; ++segment) {
      sum += sums[segment].e[r];
      weighted_grad += sums[segment].weighted_grad_sum[r];
    }
    of.mean[r] = static_cast<float>(weighted_grad / sum);
    of.weight[r] = static_cast<float>(1 / (sum * call.tau));
  }
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

// Sums of a row over head rows w: of e (G - c) w, and, behind those of all rows, of e w.
struct RowMixes {
  float* weighted_grad;
  float* plain;

  RowMixes(MixSums& sums, int rows, int row, int64_t width)
      : weighted_grad(sums.mixes() + row * width), plain(sums.mixes() + (rows + row) * width) {}

  // Moves the sums to a larger y, whose e was 1 / scale, and to c + shift.
  void move(float scale, float shift, int64_t width) const {
    for (int64_t k = 0; k < width; ++k) {
      weighted_grad[k] = scale * (weighted_grad[k] - shift * plain[k]);
      plain[k] *= scale;
    }
  }
};

void move_sums(softmax::Sums& sums, int row, double scale, double shift) {
  sums.weighted_grad_sum[row] = scale * (sums.weighted_grad_sum[row] - shift * sums.e[row]);
  sums.e[row] *= scale;
}

// <p, G> of a row over the tokens so far and a tile that holds their maximum. Relative to it the
// sums are smallest, whether p is flat or not, and so is their rounding error.
float mean_so_far(const float* y, const float* grad, int row, int rows, int tokens, double tau,
                  float factor, const MixSums& part) {
  const int lanes = gemm::lanes_of(rows);
  const float max = part.tops.max[row], inverse_tau = static_cast<float>(1 / tau);
  double sum = factor * part.sums.e[row];
  double weighted = factor * part.sums.weighted_grad_sum[row] + sum * part.centre[row];
  float of_max = 0;
  for (int t = 0; t < tokens; ++t) {
    const float e = std::exp((y[t * lanes + row] - max) * inverse_tau);
    if (!(e > 0)) continue;  // G may be infinite there
    sum += e;
    weighted += static_cast<double>(e) * grad[t * lanes + row];
    if (y[t * lanes + row] == max) of_max = grad[t * lanes + row];
  }
  const auto mean = static_cast<float>(weighted / sum);
  return std::isfinite(mean) ? mean : of_max;
}

// Moves the centres to <p, G> of the tokens so far: as sums grow, so does the rounding error of an
// old centre.
void centre_rows(int rows, int64_t width, MixSums& part) {
  for (int r = 0; r < rows; ++r) {
    const auto centre =
        static_cast<float>(part.centre[r] + part.sums.weighted_grad_sum[r] / part.sums.e[r]);
    if (!std::isfinite(centre)) continue;
    const float shift = centre - part.centre[r];
    part.centre[r] = centre;
    move_sums(part.sums, r, 1, shift);
    RowMixes(part, rows, r, width).move(1, shift, width);
  }
}

// Tiles after which rows are centred anew.
constexpr int64_t kCentredTiles = 8;
static_assert(kMixSegmentTokens % (kCentredTiles * gemm::kVocabTileTokens) == 0);

void add_segment(const RowGroup& group, const Cotangents& cotangents, const Scales& scales,
                 int64_t segment, MixSums& part) {
  const nabla_fast_mix_args& call = group.call;
  const gemm::Table head = gemm::table_of(call.head, call.vocab);
  const int64_t width = padded(head.width);
  const int rows = group.rows, lanes = gemm::lanes_of(rows);
  alignas(64) float y[softmax::kTileFloats], grad[softmax::kTileFloats];
  float factor[gemm::kRowsPerGroup];
  part.clear(2 * rows * width);
  for_each_segment_tile(segment, call.vocab, [&](int64_t token, int tokens) {
    group.load(token, tokens, y);
    cotangents.gradient(token, tokens, grad);
    scale_tile(grad, rows, tokens, scales.grad);
    if (softmax::update_max(y, rows, token, tokens, call.tau, part.tops, factor)) {
      for (int r = 0; r < rows; ++r) {
        if (part.tops.token[r] < token) continue;  // moved in an earlier tile
        const float centre = mean_so_far(y, grad, r, rows, tokens, call.tau, factor[r], part);
        const float shift = centre - part.centre[r];
        part.centre[r] = centre;
        if (part.sums.e[r] == 0) continue;  // nothing has been added yet
        move_sums(part.sums, r, factor[r], shift);
        RowMixes(part, rows, r, width).move(factor[r], shift, width);
      }
    }
    softmax::weighted_grad_sum(y, grad, rows, tokens, part.tops.max, part.centre, call.tau,
                               softmax::GradTile::kWeighted, part.sums);
    scale_tile(y, rows, tokens, scales.weights);
    scale_tile(grad, rows, tokens, scales.weights);
    gemm::add_weighted_sums(grad, lanes, rows, head.from(token), tokens, part.mixes());
    gemm::add_weighted_sums(y, lanes, rows, head.from(token), tokens, part.mixes() + rows * width);
    const int64_t end = token + tokens;
    if (end % (kCentredTiles * gemm::kVocabTileTokens) == 0 || end == call.vocab)
      centre_rows(rows, width, part);
  });
}

void join_row(const RowGroup& group, int row, MixSums& part, MixSums& total) {
  const int64_t width = padded(group.call.head.width);
  const double tau = group.call.tau;
  softmax::Tops& tops = total.tops;
  tops.nan[row] |= part.tops.nan[row];
  if (part.tops.token[row] < 0) return;
  const RowMixes mine(total, group.rows, row, width), other(part, group.rows, row, width);
  const double before = tops.max[row];
  double scale = 1, shift = 0;  // of the part
  if (part.tops.max[row] > before) {
    const double own = softmax::rescale(tops.max[row], part.tops.max[row], tau);
    if (tops.token[row] >= 0) {
      const double moved = static_cast<double>(part.centre[row]) - total.centre[row];
      move_sums(total.sums, row, own, moved);
      mine.move(static_cast<float>(own), static_cast<float>(moved), width);
    }
    tops.max[row] = part.tops.max[row];
    tops.token[row] = part.tops.token[row];
    total.centre[row] = part.centre[row];
  } else {
    scale = softmax::rescale(part.tops.max[row], tops.max[row], tau);
    shift = static_cast<double>(total.centre[row]) - part.centre[row];
  }
  total.sums.weighted_grad_sum[row] +=
      scale * (part.sums.weighted_grad_sum[row] - shift * part.sums.e[row]);
  total.sums.e[row] += scale * part.sums.e[row];
  const auto a = static_cast<float>(scale), s = static_cast<float>(shift);
  for (int64_t k = 0; k < width; ++k) {
    mine.weighted_grad[k] += a * (other.weighted_grad[k] - s * other.plain[k]);
    mine.plain[k] += a * other.plain[k];
  }
}

// Sums over all segments, in `memory`.
MixSums& sum_group(const RowGroup& group, const Cotangents& cotangents, const Scales& scales,
                   int threads, char* memory) {
  const nabla_fast_mix_args& call = group.call;
  const int64_t floats = 2 * group.rows * padded(call.head.width);
  const int64_t bytes = MixSums::bytes(floats).or_zero();
  auto* total = reinterpret_cast<MixSums*>(memory);
  const auto part = [=](int64_t n) { return reinterpret_cast<MixSums*>(memory + (n + 1) * bytes); };
  total->clear(floats);
  in_rounds(
      mix_segments(call.vocab), group.rows, threads,
      [&](int64_t segment, int64_t n) {
        add_segment(group, cotangents, scales, segment, *part(n));
      },
      [&](int row, int64_t n) { join_row(group, row, *part(n), *total); });
  return *total;
}

// Calls visit(gradient, element) for every element of a row's hidden state.
template <typename Visit>
void for_each_gradient(const RowGroup& group, const Scales& scales, int row, MixSums& total,
                       float* out, const Visit& visit) {
  const RowMixes mixes(total, group.rows, row, padded(group.call.head.width));
  const double sum = total.sums.e[row];
  const auto mean = static_cast<float>(total.sums.weighted_grad_sum[row] / sum);
  const double scale = static_cast<double>(scales.weights) * scales.grad;
  const auto weight = static_cast<float>(1 / (sum * group.call.tau * scale));
  for (int64_t k = 0; k < group.call.head.width; ++k)
    visit((mixes.weighted_grad[k] - mean * mixes.plain[k]) * weight, out[k]);
}

float* grad_row(const nabla_fast_mix_args& call, int64_t row) {
  return static_cast<float*>(call.grad.data) + row * stride_of(call.grad, call.rows);
}

void hidden_group(const RowGroup& group, const Cotangents& cotangents, int threads, char* memory) {
  const nabla_fast_mix_args& call = group.call;
  bool finite = true;
  MixSums& total = sum_group(group, cotangents, kPlain, threads, memory);
  for (int r = 0; r < group.rows; ++r) {
    const nabla_fast_status status = total.tops.status(r);
    call.row_status[group.first + r] = status;
    float* const out = grad_row(call, group.first + r);
    if (status != NABLA_FAST_OK) {
      std::fill_n(out, call.head.width, kNaN);
      continue;
    }
    for_each_gradient(group, kPlain, r, total, out, [&](float gradient, float& element) {
      element = gradient;
      finite = finite && std::isfinite(gradient);
    });
  }
  if (finite) return;
  sum_group(group, cotangents, kSmall, threads, memory);
  for (int r = 0; r < group.rows; ++r) {
    if (call.row_status[group.first + r] != NABLA_FAST_OK) continue;
    float* const out = grad_row(call, group.first + r);
    for_each_gradient(group, kSmall, r, total, out, [](float gradient, float& element) {
      if (!std::isfinite(element) && std::isfinite(gradient)) element = gradient;
    });
  }
}

// Bytes behind the hidden states and cotangents in the workspace.
Size sums_bytes(const nabla_fast_mix_args& call) {
  const int64_t rows = std::min<int64_t>(call.rows, gemm::kRowsPerGroup);
  if (is_linear(call))
    return MixSums::bytes(Size(call.head.width).rounded_up(16) * (2 * rows)) *
           (threads_of(call) + 1);
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
