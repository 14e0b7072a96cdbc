// One-hot gradients G, for onehot_grad and onehot_grad_norm.
//
//   u[v] = sum_t <T_t[v], g_t> - nu (z[v] - s)       z[v] of <head[v], hidden>
//   G[v] = u[v] + nu (logsumexp(z) - s)
//
// with a number s of each row: u is computed by tiles, logsumexp(z) at the end of the pass.
#ifndef NABLA_FAST_CPU_OPS_ONEHOT_H_
#define NABLA_FAST_CPU_OPS_ONEHOT_H_

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>

#include "base/args.h"
#include "base/check.h"
#include "base/floats.h"
#include "base/isa.h"
#include "base/overlap.h"
#include "gemm/row_pass.h"
#include "simd/vec.h"
#include "softmax/head_map.h"
#include "softmax/row_softmax.h"

namespace nabla_fast {

template <>
inline constexpr int64_t kFirstVersionBytes<nabla_fast_onehot_args> =
    offsetof(nabla_fast_onehot_args, head_map);

}  // namespace nabla_fast

namespace nabla_fast::onehot {

inline gemm::Factors factors_of(const nabla_fast_onehot_args& call) {
  return {call.hidden, call.head,  call.cotangents, call.tables,    call.table_count + 1,
          call.rows,   call.vocab, call.token_maps, call.table_rows};
}

// OK, or why what a call reads is refused.
inline nabla_fast_status check_onehot(const nabla_fast_onehot_args& call) {
  if (call.rows < 0 || call.vocab < 1 || call.table_count < 0) return NABLA_FAST_INVALID_SHAPE;
  if (const auto refused = softmax::check_head_map(call.head_map, call.vocab)) return refused;
  if (call.rows == 0) return NABLA_FAST_OK;
  if (!fits({{call.table_count, 1}}, sizeof(nabla_fast_matrix))) return NABLA_FAST_TOO_LARGE;
  if (call.table_count > 0 &&
      (!call.cotangents || !call.tables || (call.token_maps && !call.table_rows)))
    return NABLA_FAST_INVALID_POINTER;
  return gemm::check_factors(factors_of(call));
}

inline void list_inputs(const nabla_fast_onehot_args& call, Arrays& arrays) {
  arrays.reads(array_of(call.hidden, call.rows));
  arrays.reads(array_of(call.head, call.vocab));
  arrays.reads(array_of(call.head_map.bias, call.vocab));
  arrays.reads(array_of(call.cotangents, call.table_count));
  arrays.reads(array_of(call.tables, call.table_count));
  arrays.reads(array_of(call.token_maps, call.table_count));
  if (call.token_maps) arrays.reads(array_of(call.table_rows, call.table_count));
  const gemm::Factors factors = factors_of(call);
  for (int64_t t = 0; t < call.table_count; ++t) {
    arrays.reads(array_of(call.cotangents[t], call.rows));
    arrays.reads(array_of(call.tables[t], factors.rows_of_table(t + 1)));
    arrays.reads(array_of(factors.map_of(t + 1), call.vocab));
  }
}

// Bytes of a pass, which come first in a call's workspace.
inline Size pass_bytes(const nabla_fast_onehot_args& call) {
  return gemm::RowPass::bytes(call.rows, factors_of(call));
}

// Bytes of the workspace of a call that keeps a Sums of each segment and group.
template <typename Sums>
Size workspace_of(const nabla_fast_onehot_args& call) {
  if (call.rows == 0) return 0;
  const Size sums =
      Size(gemm::pass_segments(call.vocab)) * gemm::groups_of(call.rows) * sizeof(Sums);
  return pass_bytes(call) + sums + kAlignment;
}

struct OnehotTile {
  alignas(64) float z[gemm::kVocabTileTokens * gemm::kRowsPerGroup];
  alignas(64) float a[gemm::kVocabTileTokens * gemm::kRowsPerGroup];  // sum_t <T_t[v], g_t>
};

class OnehotPass {
 public:
  // Rows [first, first + rows) of the inputs, at most gemm::kRowsPerPass. `memory`:
  // RowPass::bytes().
  OnehotPass(const gemm::Factors& factors, const nabla_fast_onehot_args& call, int64_t first,
             int64_t rows, char* memory)
      : rows_(factors, first, rows, memory),
        map_(call.head_map),
        tables_(factors.count - 1),
        nll_coeff_(static_cast<float>(call.nll_coeff)) {
    alignas(64) float z[gemm::kVocabTileTokens * gemm::kRowsPerGroup];
    const int tokens = static_cast<int>(std::min<int64_t>(call.vocab, gemm::kVocabTileTokens));
    for (int g = 0; g < rows_.groups(); ++g) {
      logits(g, 0, tokens, z);
      const int lanes = rows_.lanes_of(g);
      float* s = base_ + g * gemm::kRowsPerGroup;
      // A logit of the row's first tile: differences from it are as exact as logits are.
      std::copy(z, z + lanes, s);
      for (int t = 1; t < tokens; ++t)
        for (int r = 0; r < lanes; ++r) s[r] = std::max(s[r], z[t * lanes + r]);
      for (int r = 0; r < lanes; ++r)
        if (!std::isfinite(s[r])) s[r] = 0;
    }
  }

  const gemm::RowPass& rows() const { return rows_; }
  float nll_coeff() const { return nll_coeff_; }
  // s of a group's rows.
  const float* base(int group) const { return base_ + group * gemm::kRowsPerGroup; }

  // A tile and its number of tokens, which masked ones bring up to a multiple of
  // softmax::kSumChains.
  int tile(int group, int64_t token, int tokens, OnehotTile& tile) const {
    const int lanes = rows_.lanes_of(group);
    logits(group, token, tokens, tile.z);
    if (tables_ == 0) std::fill_n(tile.a, tokens * lanes, 0.0f);
    for (int64_t t = 0; t < tables_; ++t) rows_.product(1 + t, group, token, tokens, t > 0, tile.a);
    const int whole = softmax::pad_to_chains(tile.z, lanes, tokens);
    std::fill(tile.a + tokens * lanes, tile.a + whole * lanes, 0.0f);
    return whole;
  }

  // G - u of a row.
  double offset(int row, const softmax::RowSoftmax& z) const {
    return nll_coeff_ * z.above(base_[row]);
  }

 private:
  void logits(int group, int64_t token, int tokens, float* z) const {
    rows_.product(0, group, token, tokens, false, z);
    if (!map_.is_identity())
      softmax::map_tile(map_, token, tokens, rows_.lanes_of(group), z, nullptr);
  }

  gemm::RowPass rows_;
  softmax::HeadMap map_;
  int64_t tables_;
  float nll_coeff_;
  alignas(64) float base_[gemm::kRowsPerPass];
};

template <int W>
NABLA_FAST_INLINE Ints<W> is_masked(const float* z) {
  return load<W>(z) == splat<W>(-kInfinity);
}

// u of W rows, where the token is not masked.
template <int W>
NABLA_FAST_INLINE Floats<W> onehot_term(const float* z, const float* a, Floats<W> base,
                                        float nll_coeff) {
  return load<W>(a) - nll_coeff * (load<W>(z) - base);
}

}  // namespace nabla_fast::onehot

#endif  // NABLA_FAST_CPU_OPS_ONEHOT_H_
