// Checks of an embedding mix, and its rows in groups that share a pass over tables.
#ifndef NABLA_FAST_CPU_OPS_EMBEDDING_MIX_CALL_H_
#define NABLA_FAST_CPU_OPS_EMBEDDING_MIX_CALL_H_

#include <algorithm>
#include <cstdint>

#include "base/args.h"
#include "base/check.h"
#include "base/overlap.h"
#include "gemm/vocab_tiles.h"
#include "nabla_fast.h"
#include "softmax/logit_rows.h"
#include "softmax/relaxed_tiles.h"

namespace nabla_fast::mix {

// A vocabulary is cut into segments by position alone; their sums are joined in order.
constexpr int64_t kMixSegmentTokens = 2048;

inline int64_t mix_segments(int64_t vocab) {
  return (vocab + kMixSegmentTokens - 1) / kMixSegmentTokens;
}

// OK, or why what both functions read is refused.
nabla_fast_status check_mix(const nabla_fast_mix_args& call);

// What both functions read.
void list_inputs(const nabla_fast_mix_args& call, Arrays& arrays);

inline bool is_linear(const nabla_fast_mix_args& call) { return call.logits.data == nullptr; }

// `perturbed`; no bytes where the logits are given.
inline Array perturbed_of(const nabla_fast_mix_args& call) {
  const Size bytes = Size(call.vocab) * 4 * Size(call.rows).rounded_up(16);
  return array_of_bytes(is_linear(call) ? call.perturbed : nullptr, bytes.or_zero());
}

inline softmax::NoiseKeys keys_from(const nabla_fast_mix_args& call, int64_t row) {
  if (!call.noise_seed) return {nullptr, nullptr};
  return {call.noise_seed + row, call.noise_position + row};
}

// Cotangents of a group's mixes, packed for products with the tables.
class Cotangents {
 public:
  // `memory`: bytes(call) of it, aligned.
  Cotangents(const nabla_fast_mix_args& call, char* memory) : call_(call), memory_(memory) {}

  static Size bytes(const nabla_fast_mix_args& call);

  // Packs rows [first, first + rows).
  void pack(int64_t first, int rows);

  // G of tokens [token, token + tokens): [tokens, lanes].
  void gradient(int64_t token, int tokens, float* grad) const;

 private:
  gemm::PackedRows* packed() const { return reinterpret_cast<gemm::PackedRows*>(memory_); }

  const nabla_fast_mix_args& call_;
  char* memory_;
  int64_t first_ = 0;
  int rows_ = 0;
};

// At most kRowsPerGroup rows of a call.
struct RowGroup {
  const nabla_fast_mix_args& call;
  int64_t first;
  int rows;
  gemm::PackedRows hidden;  // where the logits are products
  float* kept;              // y of the group, [vocab, lanes], or null

  // `memory`: hidden_bytes(call) of it, aligned.
  RowGroup(const nabla_fast_mix_args& call, int64_t first, char* memory)
      : call(call),
        first(first),
        rows(static_cast<int>(std::min<int64_t>(gemm::kRowsPerGroup, call.rows - first))),
        hidden{},
        kept(perturbed_of(call).empty() ? nullptr : call.perturbed + first * call.vocab) {
    if (is_linear(call))
      hidden = gemm::pack_rows(gemm::table_of(call.hidden, call.rows).from(first), rows,
                               call.head.dtype, memory);
  }

  static Size hidden_bytes(const nabla_fast_mix_args& call) {
    return is_linear(call) ? packed_bytes(call.head.width) : Size(0);
  }
  // Bytes of a group's packed rows.
  static Size packed_bytes(int64_t width) {
    return ((Size(width) + 31) * (6 * gemm::kRowsPerGroup) + kAlignment).rounded_up(kAlignment);
  }

  // The y of tokens [token, token + tokens).
  void load(int64_t token, int tokens, float* y) const {
    if (is_linear(call))
      gemm::products(hidden, gemm::table_of(call.head, call.vocab).from(token), tokens, false, y);
    else
      softmax::load_tile(gemm::table_of(call.logits, call.rows).from(first), rows, token, tokens,
                         y);
    const softmax::NoiseKeys keys = keys_from(call, first);
    if (keys.seed) softmax::add_noise(keys, rows, token, tokens, y);
  }
  // The forward's; and the backward's, of those that the forward has kept if there are any.
  void load_and_keep(int64_t token, int tokens, float* y) const {
    load(token, tokens, y);
    if (kept) std::copy_n(y, tokens * gemm::lanes_of(rows), kept + token * gemm::lanes_of(rows));
  }
  void load_kept(int64_t token, int tokens, float* y) const {
    if (!kept) return load(token, tokens, y);
    std::copy_n(kept + token * gemm::lanes_of(rows), tokens * gemm::lanes_of(rows), y);
  }
};

// Calls visit(token, tokens) for each tile of a segment.
template <typename Visit>
void for_each_segment_tile(int64_t segment, int64_t vocab, const Visit& visit) {
  const int64_t end = std::min(vocab, (segment + 1) * kMixSegmentTokens);
  for (int64_t token = segment * kMixSegmentTokens; token < end; token += gemm::kVocabTileTokens)
    visit(token, static_cast<int>(std::min<int64_t>(gemm::kVocabTileTokens, end - token)));
}

}  // namespace nabla_fast::mix

#endif  // NABLA_FAST_CPU_OPS_EMBEDDING_MIX_CALL_H_
