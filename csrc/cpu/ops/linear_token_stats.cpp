// nabla_fast_linear_token_stats: one pass over the head, by tiles of logits.

#include <algorithm>
#include <cstdint>

#include "base/args.h"
#include "base/check.h"
#include "base/floats.h"
#include "base/isa.h"
#include "gemm/row_pass.h"
#include "nabla_fast.h"
#include "ops/token_stats.h"
#include "simd/vec.h"
#include "softmax/head_map.h"
#include "softmax/row_softmax.h"
#include "softmax/token_sums.h"

namespace nabla_fast::stats {
namespace {

// TokenSums of a group of rows, over the tokens of a segment so far.
struct GroupSums {
  float max[gemm::kRowsPerGroup];
  int32_t nan[gemm::kRowsPerGroup];
  int64_t argmax[gemm::kRowsPerGroup];
  double at_max[gemm::kRowsPerGroup], sum_exp[gemm::kRowsPerGroup], sum_d_exp[gemm::kRowsPerGroup];

  void clear(int lanes) {
    for (int lane = 0; lane < lanes; ++lane) {
      nan[lane] = 0;
      set(lane, softmax::TokenSums{});
    }
  }
  softmax::TokenSums lane(int lane) const {
    softmax::TokenSums sums;
    sums.max = max[lane];
    sums.nan = nan[lane] != 0;
    sums.argmax = argmax[lane];
    sums.at_max = at_max[lane];
    sums.sum_exp = sum_exp[lane];
    sums.sum_d_exp = sum_d_exp[lane];
    return sums;
  }
  void set(int lane, const softmax::TokenSums& sums) {
    max[lane] = sums.max;
    argmax[lane] = sums.argmax;
    at_max[lane] = sums.at_max;
    sum_exp[lane] = sums.sum_exp;
    sum_d_exp[lane] = sums.sum_d_exp;
  }
};

// Sums of a lane relative to its new maximum, which is in the tile z that begins at `token`.
void rescale_to_new_max(const float* z, int lanes, int lane, int64_t token, float before,
                        const softmax::Tau& tau, GroupSums& sums) {
  const float max = sums.max[lane];
  softmax::TokenSums moved;
  // Sums relative to -inf or +inf are 0.
  if (before > -kInfinity && max < kInfinity) {
    sums.max[lane] = before;
    moved = softmax::rescaled(sums.lane(lane), max, tau.value);
  }
  moved.max = max;
  moved.argmax = token;
  for (const float* x = z + lane; *x != max; x += lanes) ++moved.argmax;
  sums.set(lane, moved);
}

// Adds a tile z[tokens, lanes]; kSumChains divides `tokens`.
template <int W>
NABLA_FAST_INLINE void add_sums_kernel(const float* z, int lanes, int tokens, int64_t token,
                                       const softmax::Tau& tau, GroupSums& sums) {
  for (int lane = 0; lane < lanes; lane += W) {
    float before[W];
    store<W>(before, load<W>(sums.max + lane));
    if (softmax::update_max<W>(z + lane, lanes, tokens, sums.max + lane, sums.nan + lane)) {
      for (int n = lane; n < lane + W; ++n)
        if (sums.max[n] > before[n - lane])
          rescale_to_new_max(z, lanes, n, token, before[n - lane], tau, sums);
    }
    const Floats<W> base = softmax::exponent_base<W>(sums.max + lane);
    Floats<W> at_max = {}, sum_exp[softmax::kSumChains] = {}, sum_d_exp[softmax::kSumChains] = {};
    for (int t = 0; t < tokens; t += softmax::kSumChains) {
#pragma GCC unroll 4
      for (int c = 0; c < softmax::kSumChains; ++c) {
        const Floats<W> d = load<W>(z + (t + c) * lanes + lane) - base;
        const Mask<W> counts = above<W>(d, tau.lowest), top = at_least<W>(d, 0.0f);
        const Floats<W> e = vec_exp2<W>(counts, d, tau.inverse_high, tau.inverse_low);
        at_max = select<W>(top, at_max + 1.0f, at_max);
        sum_exp[c] = select<W>(top, sum_exp[c], sum_exp[c] + e);
        sum_d_exp[c] = select<W>(counts, sum_d_exp[c] + d * e, sum_d_exp[c]);
      }
    }
    const Floats<W> e = (sum_exp[0] + sum_exp[1]) + (sum_exp[2] + sum_exp[3]);
    const Floats<W> d_e = (sum_d_exp[0] + sum_d_exp[1]) + (sum_d_exp[2] + sum_d_exp[3]);
    for (int n = 0; n < W; ++n) {
      sums.at_max[lane + n] += static_cast<double>(at_max[n]);
      sums.sum_exp[lane + n] += static_cast<double>(e[n]);
      sums.sum_d_exp[lane + n] += static_cast<double>(d_e[n]);
    }
  }
}

NABLA_FAST_FOR_EACH_ISA(add_sums, add_sums_kernel<W>)

gemm::Factors factors_of(const nabla_fast_stats_args& call) {
  return {call.hidden, call.head, nullptr, nullptr, 1, call.rows, call.vocab};
}

nabla_fast_status check(const nabla_fast_stats_args& call) {
  if (const auto refused = check_stats(call)) return refused;
  if (const auto refused = softmax::check_head_map(call.head_map, call.vocab)) return refused;
  return call.rows == 0 ? NABLA_FAST_OK : gemm::check_factors(factors_of(call));
}

Size pass_bytes(const nabla_fast_stats_args& call) {
  return gemm::RowPass::bytes(call.rows, factors_of(call));
}

Size workspace_of(const nabla_fast_stats_args& call) {
  if (call.rows == 0) return 0;
  const Size sums =
      Size(gemm::pass_segments(call.vocab)) * gemm::groups_of(call.rows) * sizeof(GroupSums);
  return pass_bytes(call) + sums + kAlignment;
}

void linear_token_stats(const nabla_fast_stats_args& call, char* memory) {
  auto* const add = add_sums.select();
  const gemm::Factors factors = factors_of(call);
  const softmax::Tau tau(call.tau);
  const softmax::HeadMap map(call.head_map);
  const int64_t rows = call.rows, vocab = call.vocab, segments = gemm::pass_segments(vocab);
  const int threads = gemm::pass_threads(rows, vocab, factors, call.num_threads);
  auto* const sums = reinterpret_cast<GroupSums*>(memory + pass_bytes(call).or_zero());

  for (int64_t first = 0; first < rows; first += gemm::kRowsPerPass) {
    const int64_t some = std::min(gemm::kRowsPerPass, rows - first);
    const gemm::RowPass pass(factors, first, some, memory);
    const int groups = pass.groups();
    gemm::for_each_pass_tile(
        vocab, groups, threads, [&](int64_t segment, int group, int64_t token, int tokens) {
          alignas(64) float z[gemm::kVocabTileTokens * gemm::kRowsPerGroup];
          const int lanes = pass.lanes_of(group);
          GroupSums& mine = sums[segment * groups + group];
          if (token == segment * gemm::kPassSegmentTokens) mine.clear(lanes);
          pass.product(0, group, token, tokens, false, z);
          if (!map.is_identity()) softmax::map_tile(map, token, tokens, lanes, z, nullptr);
          add(z, lanes, softmax::pad_to_chains(z, lanes, tokens), token, tau, mine);
        });
    for (int row = 0; row < some; ++row) {
      softmax::TokenSums joint;
      for (int64_t s = 0; s < segments; ++s)
        joint = softmax::joined(
            joint, sums[s * groups + row / gemm::kRowsPerGroup].lane(row % gemm::kRowsPerGroup),
            tau.value);
      write_stats(call, first + row, joint, tau);
    }
  }
}

}  // namespace
}  // namespace nabla_fast::stats

using namespace nabla_fast;
using namespace nabla_fast::stats;

int64_t nabla_fast_linear_token_stats_workspace(const nabla_fast_stats_args* args) {
  return workspace_bytes(args, check, workspace_of);
}

nabla_fast_status nabla_fast_linear_token_stats(const nabla_fast_stats_args* args) {
  nabla_fast_stats_args call;
  if (const auto refused = read_args(args, call)) return refused;
  if (const auto refused = check(call)) return refused;
  if (call.rows == 0) return NABLA_FAST_OK;
  if (const auto refused = check_results(call)) return refused;
  const int64_t bytes = workspace_of(call).or_zero();
  if (const auto refused = check_workspace(call, bytes)) return refused;
  const bool overlap = any_overlap([&](auto& arrays) {
    list_results(call, arrays);
    arrays.writes(array_of_bytes(call.workspace, bytes));
    arrays.reads(array_of(call.hidden, call.rows));
    arrays.reads(array_of(call.head, call.vocab));
    arrays.reads(array_of(call.head_map.bias, call.vocab));
  });
  if (overlap) return NABLA_FAST_OVERLAP;
  linear_token_stats(call, aligned(call.workspace));
  return NABLA_FAST_OK;
}
