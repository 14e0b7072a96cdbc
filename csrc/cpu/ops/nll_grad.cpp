// nabla_fast_nll_grad: the gradient of a linear cross-entropy with respect to its hidden states.
// The vocabulary is read in blocks; logits exist for one block of one group of rows at a time.
//
// The vocabulary is cut into segments, by position alone. A segment keeps for each row the largest
// logit so far, the sum of exponentials under it and their sum times the head's rows; segments are
// joined from left to right, on whatever thread they were computed. The target's own term is left
// out of both sums and joined at the end, where 1 - p would be lost to rounding. The head may hold
// numbers so large that sums overflow though the gradient does not: then there is a second pass,
// with smaller exponentials.

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>

#include "base/args.h"
#include "base/check.h"
#include "base/floats.h"
#include "base/isa.h"
#include "base/overlap.h"
#include "base/threads.h"
#include "gemm/add_weighted_rows.h"
#include "gemm/dot_products.h"
#include "gemm/vocab_tiles.h"
#include "nabla_fast.h"
#include "simd/vec_exp.h"
#include "softmax/head_map.h"
#include "softmax/row_softmax.h"
#include "softmax/row_status.h"

namespace nabla_fast {

template <>
inline constexpr int64_t kFirstVersionBytes<nabla_fast_nll_grad_args> =
    offsetof(nabla_fast_nll_grad_args, head_map);

}  // namespace nabla_fast

namespace nabla_fast::nll {
namespace {

constexpr int64_t kNllSegmentTokens = 8192;
// Rows that share a reading of the head, and tokens whose logits exist at once.
constexpr int64_t kRowsPerHeadRead = 64;
constexpr int64_t kLogitTokens = gemm::kTokensInL2;
// Factors of exponentials in the first pass and in the second, whose sums stay finite: with numbers
// up to 2^128, those of 2^31 tokens reach 2^95.
constexpr float kScales[] = {1, 0x1p-64f};

int64_t segments_of(int64_t vocab) { return (vocab + kNllSegmentTokens - 1) / kNllSegmentTokens; }

// Sums of a group of rows over a segment.
struct Part {
  float* max;            // [rows]
  float* sum;            // [rows] of e = exp(logit - max) scale, the target's left out
  float* target;         // [rows] its logit, if it lies in the segment
  float* nan;            // [rows] other than 0 if a logit is NaN
  float* weighted_rows;  // [rows, padded(width)] of e dz/du times the head's row, likewise

  static int64_t floats(int64_t rows, int64_t width) { return rows * (4 + padded(width)); }

  Part(float* memory, int64_t rows)
      : max(memory),
        sum(memory + rows),
        target(memory + 2 * rows),
        nan(memory + 3 * rows),
        weighted_rows(memory + 4 * rows) {}
};

// Tokens [first, last) for the rows of `p`, at most kRowsPerHeadRead.
template <int W, typename T>
NABLA_FAST_INLINE void segment(const gemm::HeadProduct& p, const softmax::HeadMap& map,
                               const int64_t* targets, int64_t first, int64_t last, float scale,
                               Part part) {
  int64_t width = padded(p.width);
  for (int64_t r = 0; r < p.rows; ++r) {
    part.max[r] = -kInfinity;
    part.sum[r] = 0;
    part.target[r] = -kInfinity;
    part.nan[r] = 0;
  }
  std::fill_n(part.weighted_rows, p.rows * width, 0.0f);
  float z[kRowsPerHeadRead * kLogitTokens], slope[kLogitTokens];
  const bool is_identity = map.is_identity();
  for (int64_t block = first; block < last; block += kLogitTokens) {
    int tokens = static_cast<int>(std::min(kLogitTokens, last - block));
    gemm::dot_block<W, T>(p, block, block + tokens, z, kLogitTokens);
    for (int64_t r = 0; r < p.rows; ++r) {
      float* row = z + r * kLogitTokens;
      if (!is_identity) softmax::map_row_kernel<W>(map, block, tokens, row, slope);
      int64_t target = targets[r] - block;
      bool here = target >= 0 && target < tokens;
      if (here) part.target[r] = row[target];
      float top = part.max[r];
      int32_t nan = 0;
      for (int t = 0; t < tokens; ++t) {
        top = row[t] > top ? row[t] : top;
        nan |= row[t] != row[t];
      }
      if (nan) part.nan[r] = 1;
      if (top > part.max[r]) {
        float factor = vec_exp(part.max[r] - top);
        part.sum[r] *= factor;
        for (int64_t k = 0; k < width; ++k) part.weighted_rows[r * width + k] *= factor;
        part.max[r] = top;
      }
      // A row of -inf alone so far: its differences would be NaN.
      float shift = top > -kInfinity ? top : 0.0f;
      for (int t = 0; t < tokens; ++t) row[t] = vec_exp(row[t] - shift) * scale;
      if (here) row[target] = 0;
      float sum = 0;
      for (int t = 0; t < tokens; ++t) sum += row[t];
      part.sum[r] += sum;
      if (!is_identity)
        for (int t = 0; t < tokens; ++t) row[t] *= slope[t];
    }
    const T* head = static_cast<const T*>(p.head) + block * p.head_stride;
    gemm::add_weighted_rows<W, T>(z, kLogitTokens, p.rows, tokens, head, p.head_stride, p.width,
                                  part.weighted_rows, width);
  }
}

NABLA_FAST_FOR_EACH_ISA(fp32_segment, segment<W, float>)
NABLA_FAST_FOR_EACH_ISA(bf16_segment, segment<W, uint16_t>)

// Joins a row's parts from left to right, in the memory of the first, and puts the gradient: of the
// second pass those elements that are not finite after the first. Returns whether all are finite.
bool join(const gemm::HeadProduct& p, const softmax::HeadMap& map, nabla_fast_dtype dtype,
          int64_t target, float scale, float* memory, int64_t segments, int64_t row, float* out,
          nabla_fast_status& status) {
  int64_t width = padded(p.width), floats = Part::floats(p.rows, p.width);
  float top = -kInfinity, target_logit = -kInfinity;
  bool nan = false;
  for (int64_t s = 0; s < segments; ++s) {
    Part part(memory + s * floats, p.rows);
    nan = nan || part.nan[row] != 0;
    top = std::max(top, part.max[row]);
    if (target / kNllSegmentTokens == s) target_logit = part.target[row];
  }
  status = softmax::row_status(top, nan);
  if (status != NABLA_FAST_OK) {
    std::fill_n(out, p.width, kNaN);
    return true;
  }
  const gemm::Table head{p.head, dtype, p.width, p.head_stride};
  double rest = 0;
  float* const joined = Part(memory, p.rows).weighted_rows + row * width;
  for (int64_t s = 0; s < segments; ++s) {
    Part part(memory + s * floats, p.rows);
    double factor = softmax::rescale(part.max[row], top);
    rest += factor * part.sum[row];
    for (int64_t k = 0; k < p.width; ++k)
      joined[k] = (s == 0 ? 0.0f : joined[k]) +
                  static_cast<float>(factor) * part.weighted_rows[row * width + k];
  }
  double inverse = 1 / (rest + scale * softmax::rescale(target_logit, top));
  const double weight = rest * map.slope(target_logit);
  bool finite = true;
  for (int64_t k = 0; k < p.width; ++k) {
    const auto grad = static_cast<float>((joined[k] - weight * head.value(target, k)) * inverse);
    if (scale == 1 || (!std::isfinite(out[k]) && std::isfinite(grad))) out[k] = grad;
    finite = finite && std::isfinite(out[k]);
  }
  return finite;
}

nabla_fast_status check(const nabla_fast_nll_grad_args& call) {
  if (call.rows < 0 || call.vocab < 1) return NABLA_FAST_INVALID_SHAPE;
  if (const auto refused = softmax::check_head_map(call.head_map, call.vocab)) return refused;
  if (call.rows == 0) return NABLA_FAST_OK;
  if (const auto refused = check_float32(call.hidden, call.rows, call.hidden.width)) return refused;
  if (const auto refused = check_matrix(call.head, call.vocab, call.hidden.width)) return refused;
  if (!fits({{call.rows, 1}}, 8) || !fits({{call.vocab, 1}, {call.hidden.width, 1}}, 4))
    return NABLA_FAST_TOO_LARGE;
  return call.targets ? NABLA_FAST_OK : NABLA_FAST_INVALID_POINTER;
}

Size workspace_of(const nabla_fast_nll_grad_args& call) {
  if (call.rows == 0) return 0;
  const int64_t rows = std::min(call.rows, kRowsPerHeadRead);
  return Size(segments_of(call.vocab)) * Part::floats(rows, call.hidden.width) * 4 + kAlignment;
}

}  // namespace
}  // namespace nabla_fast::nll

using namespace nabla_fast;
using namespace nabla_fast::nll;

int64_t nabla_fast_nll_grad_workspace(const nabla_fast_nll_grad_args* args) {
  return workspace_bytes(args, check, workspace_of);
}

nabla_fast_status nabla_fast_nll_grad(const nabla_fast_nll_grad_args* args) {
  nabla_fast_nll_grad_args call;
  if (const auto refused = read_args(args, call)) return refused;
  if (const auto refused = check(call)) return refused;
  if (call.rows == 0) return NABLA_FAST_OK;
  const int64_t rows = call.rows, vocab = call.vocab, width = call.hidden.width;
  if (const auto refused = check_float32(call.grad, rows, width)) return refused;
  if (!call.row_status) return NABLA_FAST_INVALID_POINTER;
  const int64_t bytes = workspace_of(call).or_zero();
  if (const auto refused = check_workspace(call, bytes)) return refused;
  const bool overlap = any_overlap([&](auto& arrays) {
    arrays.writes(array_of(call.grad, rows));
    arrays.writes(array_of(call.row_status, rows));
    arrays.writes(array_of_bytes(call.workspace, bytes));
    arrays.reads(array_of(call.hidden, rows));
    arrays.reads(array_of(call.head, vocab));
    arrays.reads(array_of(call.head_map.bias, vocab));
    arrays.reads(array_of(call.targets, rows));
  });
  if (overlap) return NABLA_FAST_OVERLAP;
  const int64_t* const targets = call.targets;
  if (std::any_of(targets, targets + rows, [=](int64_t t) { return t < 0 || t >= vocab; }))
    return NABLA_FAST_INVALID_TOKEN;
  const softmax::HeadMap map(call.head_map);
  auto* const run = (call.head.dtype == NABLA_FAST_FLOAT32 ? fp32_segment : bf16_segment).select();
  auto* const memory = reinterpret_cast<float*>(aligned(call.workspace));
  const int64_t hidden_stride = stride_of(call.hidden, rows);
  const int64_t grad_stride = stride_of(call.grad, rows);
  int64_t segments = segments_of(vocab);
  for (int64_t first = 0; first < rows; first += kRowsPerHeadRead) {
    int64_t count = std::min(kRowsPerHeadRead, rows - first);
    gemm::HeadProduct p{static_cast<const float*>(call.hidden.data) + first * hidden_stride,
                        count,
                        hidden_stride,
                        call.head.data,
                        vocab,
                        width,
                        stride_of(call.head, vocab)};
    int64_t floats = Part::floats(count, width);
    const int threads = threads_for(segments, 1, call.num_threads);
    for (const float scale : kScales) {
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1)
      for (int64_t s = 0; s < segments; ++s)
        run(p, map, targets + first, s * kNllSegmentTokens,
            std::min(vocab, (s + 1) * kNllSegmentTokens), scale, Part(memory + s * floats, count));
      bool finite = true;
      for (int64_t r = 0; r < count; ++r)
        finite &= join(p, map, call.head.dtype, targets[first + r], scale, memory, segments, r,
                       static_cast<float*>(call.grad.data) + (first + r) * grad_stride,
                       call.row_status[first + r]);
      if (finite) break;
    }
  }
  return NABLA_FAST_OK;
}
