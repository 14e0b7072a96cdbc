// nabla_fast_onehot_grad: one pass over head and tables, which writes u, and one over u, which adds
// the row's log-sum-exp.

#include <algorithm>
#include <cstdint>
#include <cstring>

#include "base/check.h"
#include "base/floats.h"
#include "base/isa.h"
#include "gemm/row_pass.h"
#include "nabla_fast.h"
#include "ops/onehot.h"
#include "simd/vec.h"
#include "simd/vec_exp.h"
#include "softmax/row_softmax.h"

namespace nabla_fast::onehot {
namespace {

// Mark of a masked token between the passes. No other u is -0: +0 is added to them.
constexpr float kMasked = -0.0f;

struct Rows {
  float* data;
  int64_t stride;
};

// u of a tile into the rows of `to`, which begin at the tile's first token.
template <int W>
NABLA_FAST_INLINE void store_u(const OnehotTile& tile, const float* base, float nll_coeff, int rows,
                               int tokens, Rows to) {
  const int lanes = gemm::lanes_of(rows);
  for (int r = 0; r < rows; r += W) {
    const Floats<W> base_of_row = load<W>(base + r);
    for (int t = 0; t < tokens; t += W) {
      Floats<W> u[W];
      for (int n = 0; n < W; ++n) {
        const int at = std::min(t + n, tokens - 1) * lanes + r;
        const Floats<W> term = onehot_term<W>(tile.z + at, tile.a + at, base_of_row, nll_coeff);
        u[n] = is_masked<W>(tile.z + at) ? -Floats<W>{} : term + 0.0f;
      }
      transpose<W>(u);
      const int some_rows = std::min(W, rows - r), some_tokens = std::min(W, tokens - t);
      for (int n = 0; n < some_rows; ++n) {
        float* row = to.data + (r + n) * to.stride + t;
        if (some_tokens == W)
          store<W>(row, u[n]);
        else
          std::memcpy(row, &u[n], sizeof(float) * static_cast<size_t>(some_tokens));
      }
    }
  }
}

template <int W>
NABLA_FAST_INLINE void finish_tile_kernel(OnehotTile& tile, const float* base, float nll_coeff,
                                          int rows, int tokens, int whole,
                                          softmax::LaneSoftmax& sums, Rows to) {
  softmax::add_exps<W>(tile.z, gemm::lanes_of(rows), whole, sums);
  store_u<W>(tile, base, nll_coeff, rows, tokens, to);
}

NABLA_FAST_FOR_EACH_ISA(finish_tile, finish_tile_kernel<W>)

// G from u: 0 where the token is masked.
NABLA_FAST_INLINE void add_offset_kernel(float* u, int64_t n, float offset) {
  for (int64_t i = 0; i < n; ++i)
    u[i] = float_bits(u[i]) == float_bits(kMasked) ? 0.0f : u[i] + offset;
}

NABLA_FAST_FOR_EACH_ISA(add_offset, add_offset_kernel)

void onehot_grad(const nabla_fast_onehot_args& inputs, char* memory) {
  const Rows grad{static_cast<float*>(inputs.grad.data), inputs.grad.stride};
  auto* const finish = finish_tile.select();
  auto* const add = add_offset.select();
  const gemm::Factors factors = factors_of(inputs);
  const int64_t vocab = inputs.vocab, segments = gemm::pass_segments(vocab);
  const int threads = gemm::pass_threads(inputs.rows, vocab, factors, inputs.num_threads);
  auto* const sums = reinterpret_cast<softmax::LaneSoftmax*>(memory + pass_bytes(inputs).or_zero());

  for (int64_t first = 0; first < inputs.rows; first += gemm::kRowsPerPass) {
    const int64_t rows = std::min(gemm::kRowsPerPass, inputs.rows - first);
    const OnehotPass pass(factors, inputs, first, rows, memory);
    const int groups = pass.rows().groups();
    gemm::for_each_pass_tile(
        vocab, groups, threads, [&](int64_t segment, int group, int64_t token, int tokens) {
          OnehotTile tile;
          softmax::LaneSoftmax& mine = sums[segment * groups + group];
          if (token == segment * gemm::kPassSegmentTokens) mine.clear(pass.rows().lanes_of(group));
          const int whole = pass.tile(group, token, tokens, tile);
          float* const to = grad.data + (first + group * gemm::kRowsPerGroup) * grad.stride + token;
          finish(tile, pass.base(group), pass.nll_coeff(), pass.rows().rows_of(group), tokens,
                 whole, mine, {to, grad.stride});
        });

    float offset[gemm::kRowsPerPass];
    for (int row = 0; row < rows; ++row) {
      softmax::RowSoftmax z;
      for (int64_t s = 0; s < segments; ++s)
        z.join(sums[s * groups + row / gemm::kRowsPerGroup].lane(row % gemm::kRowsPerGroup));
      inputs.row_status[first + row] = z.status();
      offset[row] = z.status() == NABLA_FAST_OK ? static_cast<float>(pass.offset(row, z)) : kNaN;
    }
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1)
    for (int64_t n = 0; n < rows * segments; ++n) {
      const int64_t row = n / segments, token = n % segments * gemm::kPassSegmentTokens;
      float* const u = grad.data + (first + row) * grad.stride + token;
      const int64_t tokens = std::min(gemm::kPassSegmentTokens, vocab - token);
      if (inputs.row_status[first + row] == NABLA_FAST_OK)
        add(u, tokens, offset[row]);
      else
        std::fill_n(u, tokens, offset[row]);
    }
  }
}

}  // namespace
}  // namespace nabla_fast::onehot

using namespace nabla_fast;
using namespace nabla_fast::onehot;

int64_t nabla_fast_onehot_grad_workspace(const nabla_fast_onehot_args* args) {
  return workspace_bytes(args, check_onehot, workspace_of<softmax::LaneSoftmax>);
}

nabla_fast_status nabla_fast_onehot_grad(const nabla_fast_onehot_args* args) {
  nabla_fast_onehot_args call;
  if (const auto refused = read_args(args, call)) return refused;
  if (const auto refused = check_onehot(call)) return refused;
  if (call.rows == 0) return NABLA_FAST_OK;
  if (const auto refused = check_float32(call.grad, call.rows, call.vocab)) return refused;
  if (!fits({{call.rows, 1}}, 4)) return NABLA_FAST_TOO_LARGE;
  if (!call.row_status) return NABLA_FAST_INVALID_POINTER;
  const int64_t bytes = workspace_of<softmax::LaneSoftmax>(call).or_zero();
  if (const auto refused = check_workspace(call, bytes)) return refused;
  const bool overlap = any_overlap([&](auto& arrays) {
    arrays.writes(array_of(call.grad, call.rows));
    arrays.writes(array_of(call.row_status, call.rows));
    arrays.writes(array_of_bytes(call.workspace, bytes));
    list_inputs(call, arrays);
  });
  if (overlap) return NABLA_FAST_OVERLAP;
  if (const auto refused = gemm::check_maps(factors_of(call))) return refused;
  onehot_grad(call, aligned(call.workspace));
  return NABLA_FAST_OK;
}
