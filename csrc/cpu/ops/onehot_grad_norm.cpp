// nabla_fast_onehot_grad_norm: one pass over head and tables.
//
// With n tokens that are not masked, the mean m of u and an offset c that is known when the pass is
// over, ||u + c||^2 = sum (u - m)^2 + n (m + c)^2. The sums of u and u^2 are taken in double, where
// their cancellation stays far below the rounding of u.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>

#include "base/check.h"
#include "base/floats.h"
#include "base/isa.h"
#include "gemm/row_pass.h"
#include "nabla_fast.h"
#include "ops/onehot.h"
#include "simd/vec.h"
#include "softmax/row_softmax.h"

namespace nabla_fast::onehot {
namespace {

// Sums over a row's tokens that are not masked.
struct Moments {
  softmax::RowSoftmax z;
  double count = 0, sum = 0, squares = 0;  // of u

  void join(const Moments& right) {
    z.join(right.z);
    count += right.count;
    sum += right.sum;
    squares += right.squares;
  }

  double norm(double offset) const {
    const double mean = sum / count, centred = mean + offset;
    // Infinite sums have no difference.
    if (!(squares <= std::numeric_limits<double>::max())) return squares;
    return std::sqrt(std::max(squares - sum * mean, 0.0) + count * centred * centred);
  }
};

// Moments of a group of rows, by lanes.
struct LaneMoments {
  softmax::LaneSoftmax z;
  int32_t count[gemm::kRowsPerGroup];
  double sum[gemm::kRowsPerGroup], squares[gemm::kRowsPerGroup];

  void clear(int lanes) {
    z.clear(lanes);
    std::fill_n(count, lanes, 0);
    std::fill_n(sum, lanes, 0.0);
    std::fill_n(squares, lanes, 0.0);
  }
  Moments lane(int lane) const {
    return {z.lane(lane), static_cast<double>(count[lane]), sum[lane], squares[lane]};
  }
};

template <int W>
struct DoubleTypes {
  typedef double Doubles __attribute__((vector_size(8 * W)));
  // Doubles anywhere in an array.
  typedef double Stored __attribute__((vector_size(8 * W), aligned(8), may_alias));
};

template <int W>
NABLA_FAST_INLINE void add_to(double* x, typename DoubleTypes<W>::Doubles y) {
  auto* const stored = reinterpret_cast<typename DoubleTypes<W>::Stored*>(x);
  *stored += y;
}

// Adds a tile; `whole`: its tokens, masked ones behind the last included.
template <int W>
NABLA_FAST_INLINE void add_moments_kernel(const OnehotTile& tile, const float* base,
                                          float nll_coeff, int lanes, int whole,
                                          LaneMoments& sums) {
  using Doubles = typename DoubleTypes<W / 2>::Doubles;
  softmax::add_exps<W>(tile.z, lanes, whole, sums.z);
  for (int lane = 0; lane < lanes; lane += W) {
    const Floats<W> base_of_row = load<W>(base + lane);
    Ints<W> count = {};
    Doubles sum[2] = {}, squares[2] = {};
    for (int t = 0; t < whole; ++t) {
      const int at = t * lanes + lane;
      const Ints<W> masked = is_masked<W>(tile.z + at);
      const Floats<W> term = onehot_term<W>(tile.z + at, tile.a + at, base_of_row, nll_coeff);
      Floats<W / 2> half[2];
      split<W>(masked ? Floats<W>{} : term, half[0], half[1]);
      count += masked + 1;  // a mask's lanes are 0 or -1
#pragma GCC unroll 2
      for (int h = 0; h < 2; ++h) {
        const Doubles u = __builtin_convertvector(half[h], Doubles);
        sum[h] += u;
        squares[h] += u * u;
      }
    }
    for (int n = 0; n < W; ++n) sums.count[lane + n] += count[n];
#pragma GCC unroll 2
    for (int h = 0; h < 2; ++h) {
      add_to<W / 2>(sums.sum + lane + h * W / 2, sum[h]);
      add_to<W / 2>(sums.squares + lane + h * W / 2, squares[h]);
    }
  }
}

NABLA_FAST_FOR_EACH_ISA(add_moments, add_moments_kernel<W>)

void onehot_grad_norm(const nabla_fast_onehot_args& inputs, char* memory) {
  auto* const add = add_moments.select();
  const gemm::Factors factors = factors_of(inputs);
  const int64_t vocab = inputs.vocab, segments = gemm::pass_segments(vocab);
  const int threads = gemm::pass_threads(inputs.rows, vocab, factors, inputs.num_threads);
  auto* const sums = reinterpret_cast<LaneMoments*>(memory + pass_bytes(inputs).or_zero());

  for (int64_t first = 0; first < inputs.rows; first += gemm::kRowsPerPass) {
    const int64_t rows = std::min(gemm::kRowsPerPass, inputs.rows - first);
    const OnehotPass pass(factors, inputs, first, rows, memory);
    const int groups = pass.rows().groups();
    gemm::for_each_pass_tile(vocab, groups, threads,
                             [&](int64_t segment, int group, int64_t token, int tokens) {
                               OnehotTile tile;
                               const int lanes = pass.rows().lanes_of(group);
                               LaneMoments& mine = sums[segment * groups + group];
                               if (token == segment * gemm::kPassSegmentTokens) mine.clear(lanes);
                               const int whole = pass.tile(group, token, tokens, tile);
                               add(tile, pass.base(group), pass.nll_coeff(), lanes, whole, mine);
                             });

    for (int row = 0; row < rows; ++row) {
      Moments moments;
      for (int64_t s = 0; s < segments; ++s)
        moments.join(sums[s * groups + row / gemm::kRowsPerGroup].lane(row % gemm::kRowsPerGroup));
      const nabla_fast_status status = moments.z.status();
      inputs.row_status[first + row] = status;
      inputs.norm[first + row] = status == NABLA_FAST_OK
                                     ? static_cast<float>(moments.norm(pass.offset(row, moments.z)))
                                     : kNaN;
    }
  }
}

}  // namespace
}  // namespace nabla_fast::onehot

using namespace nabla_fast;
using namespace nabla_fast::onehot;

int64_t nabla_fast_onehot_grad_norm_workspace(const nabla_fast_onehot_args* args) {
  return workspace_bytes(args, check_onehot, workspace_of<LaneMoments>);
}

nabla_fast_status nabla_fast_onehot_grad_norm(const nabla_fast_onehot_args* args) {
  nabla_fast_onehot_args call;
  if (const auto refused = read_args(args, call)) return refused;
  if (const auto refused = check_onehot(call)) return refused;
  if (call.rows == 0) return NABLA_FAST_OK;
  if (!fits({{call.rows, 1}}, sizeof(float))) return NABLA_FAST_TOO_LARGE;
  if (!call.norm || !call.row_status) return NABLA_FAST_INVALID_POINTER;
  const int64_t bytes = workspace_of<LaneMoments>(call).or_zero();
  if (const auto refused = check_workspace(call, bytes)) return refused;
  const bool overlap = any_overlap([&](auto& arrays) {
    arrays.writes(array_of(call.norm, call.rows));
    arrays.writes(array_of(call.row_status, call.rows));
    arrays.writes(array_of_bytes(call.workspace, bytes));
    list_inputs(call, arrays);
  });
  if (overlap) return NABLA_FAST_OVERLAP;
  if (const auto refused = gemm::check_maps(factors_of(call))) return refused;
  onehot_grad_norm(call, aligned(call.workspace));
  return NABLA_FAST_OK;
}
