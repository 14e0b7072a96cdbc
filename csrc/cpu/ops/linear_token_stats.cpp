// nabla_fast_linear_token_stats: one pass over the head, by tiles of logits.

#include <algorithm>
#include <cstdint>

#include "base/check.h"
#include "base/floats.h"
#include "base/isa.h"
#include "gemm/row_pass.h"
#include "nabla_fast.h"
#include "simd/vec.h"
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

gemm::Factors factors_of(const nabla_fast_table& hidden, int64_t rows, const nabla_fast_table& head,
                         int64_t vocab) {
  return {hidden, head, nullptr, nullptr, 1, rows, vocab};
}

nabla_fast_status check(const nabla_fast_table* hidden, int64_t rows, const nabla_fast_table* head,
                        int64_t vocab) {
  if (!hidden || !head) return NABLA_FAST_INVALID_POINTER;
  if (rows < 0 || vocab < 1) return NABLA_FAST_INVALID_SHAPE;
  return gemm::check_factors(factors_of(*hidden, rows, *head, vocab), rows, vocab);
}

Size sums_bytes(int64_t rows, int64_t vocab) {
  return Size(gemm::pass_segments(vocab)) * gemm::groups_of(rows) * sizeof(GroupSums);
}

void linear_token_stats(const gemm::Factors& factors, int64_t rows, int64_t vocab,
                        const softmax::Tau& tau, const softmax::StatsOutputs& outputs, char* memory,
                        int32_t num_threads) {
  auto* const add = add_sums.select();
  const int64_t segments = gemm::pass_segments(vocab);
  const int threads = gemm::pass_threads(rows, vocab, factors, num_threads);
  auto* const sums =
      reinterpret_cast<GroupSums*>(memory + gemm::RowPass::bytes(rows, factors).or_zero());

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
          add(z, lanes, softmax::pad_to_chains(z, lanes, tokens), token, tau, mine);
        });
    for (int row = 0; row < some; ++row) {
      softmax::TokenSums joint;
      for (int64_t s = 0; s < segments; ++s)
        joint = softmax::joined(
            joint, sums[s * groups + row / gemm::kRowsPerGroup].lane(row % gemm::kRowsPerGroup),
            tau.value);
      outputs.write(first + row, joint, tau);
    }
  }
}

}  // namespace
}  // namespace nabla_fast::stats

using namespace nabla_fast;
using namespace nabla_fast::stats;

int64_t nabla_fast_linear_token_stats_workspace(const nabla_fast_table* hidden, int64_t rows,
                                                const nabla_fast_table* head, int64_t vocab) {
  if (check(hidden, rows, head, vocab) != NABLA_FAST_OK) return 0;
  const gemm::Factors factors = factors_of(*hidden, rows, *head, vocab);
  return (gemm::RowPass::bytes(rows, factors) + sums_bytes(rows, vocab) + kAlignment).or_zero();
}

nabla_fast_status nabla_fast_linear_token_stats(const nabla_fast_table* hidden, int64_t rows,
                                                const nabla_fast_table* head, int64_t vocab,
                                                double tau, float* logsumexp, float* confidence,
                                                float* entropy, int64_t* argmax,
                                                nabla_fast_status* row_status, void* workspace,
                                                int64_t workspace_bytes, int32_t num_threads) {
  if (const nabla_fast_status wrong = check(hidden, rows, head, vocab)) return wrong;
  if (!is_tau(tau)) return NABLA_FAST_INVALID_TAU;
  if (rows == 0) return NABLA_FAST_OK;
  if (!fits({{rows, 1}}, sizeof(int64_t))) return NABLA_FAST_TOO_LARGE;
  if (!logsumexp || !confidence || !entropy || !argmax || !row_status || !workspace)
    return NABLA_FAST_INVALID_POINTER;
  const int64_t bytes = nabla_fast_linear_token_stats_workspace(hidden, rows, head, vocab);
  if (bytes == 0) return NABLA_FAST_TOO_LARGE;
  if (workspace_bytes < bytes) return NABLA_FAST_WORKSPACE_TOO_SMALL;
  linear_token_stats(factors_of(*hidden, rows, *head, vocab), rows, vocab, softmax::Tau(tau),
                     {logsumexp, confidence, entropy, argmax, row_status}, aligned(workspace),
                     num_threads);
  return NABLA_FAST_OK;
}
