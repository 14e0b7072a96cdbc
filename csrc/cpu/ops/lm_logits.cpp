// nabla_fast_lm_logits: hidden states times a head. For few rows the head is read once, at the rate
// of memory, and a bf16 head is never converted as a whole.

#include <algorithm>
#include <cstddef>
#include <cstdint>

#include "base/args.h"
#include "base/check.h"
#include "base/isa.h"
#include "base/overlap.h"
#include "base/threads.h"
#include "gemm/dot_products.h"
#include "nabla_fast.h"
#include "softmax/head_map.h"

namespace nabla_fast {

template <>
inline constexpr int64_t kFirstVersionBytes<nabla_fast_lm_logits_args> =
    offsetof(nabla_fast_lm_logits_args, head_map);

}  // namespace nabla_fast

namespace nabla_fast::logits {
namespace {

// Tokens between which threads may be split.
constexpr int64_t kTokensPerTask = 512;
// Multiplications worth another thread.
constexpr int64_t kProductsPerThread = 1 << 18;

// All rows with tokens [first, last).
template <int W, typename T>
NABLA_FAST_INLINE void chunk(const gemm::HeadProduct& p, int64_t first, int64_t last,
                             const softmax::HeadMap& map, float* logits, int64_t stride) {
  for (int64_t block = first; block < last; block += gemm::kTokensInL2) {
    const int64_t end = std::min(last, block + gemm::kTokensInL2);
    gemm::dot_block<W, T>(p, block, end, logits + block, stride);
    if (map.is_identity()) continue;
    for (int64_t r = 0; r < p.rows; ++r)
      softmax::map_row_kernel<W>(map, block, end - block, logits + r * stride + block, nullptr);
  }
}

NABLA_FAST_FOR_EACH_ISA(fp32_chunk, chunk<W, float>)
NABLA_FAST_FOR_EACH_ISA(bf16_chunk, chunk<W, uint16_t>)

}  // namespace
}  // namespace nabla_fast::logits

using namespace nabla_fast;
using namespace nabla_fast::logits;

nabla_fast_status nabla_fast_lm_logits(const nabla_fast_lm_logits_args* args) {
  nabla_fast_lm_logits_args call;
  if (const auto refused = read_args(args, call)) return refused;
  if (call.rows < 0 || call.vocab < 0) return NABLA_FAST_INVALID_SHAPE;
  if (const auto refused = softmax::check_head_map(call.head_map, call.vocab)) return refused;
  if (call.rows == 0 || call.vocab == 0) return NABLA_FAST_OK;
  const int64_t rows = call.rows, vocab = call.vocab, width = call.hidden.width;
  if (const auto refused = check_float32(call.hidden, rows, width)) return refused;
  if (const auto refused = check_matrix(call.head, vocab, width)) return refused;
  if (const auto refused = check_float32(call.logits, rows, vocab)) return refused;
  const bool overlap = any_overlap([&](auto& arrays) {
    arrays.writes(array_of(call.logits, rows));
    arrays.reads(array_of(call.hidden, rows));
    arrays.reads(array_of(call.head, vocab));
    arrays.reads(array_of(call.head_map.bias, vocab));
  });
  if (overlap) return NABLA_FAST_OVERLAP;
  gemm::HeadProduct product{static_cast<const float*>(call.hidden.data),
                            rows,
                            stride_of(call.hidden, rows),
                            call.head.data,
                            vocab,
                            width,
                            stride_of(call.head, vocab)};
  auto* const logits = static_cast<float*>(call.logits.data);
  const softmax::HeadMap map(call.head_map);
  auto* const run = (call.head.dtype == NABLA_FAST_FLOAT32 ? fp32_chunk : bf16_chunk).select();
  int64_t chunks = (vocab + kTokensPerTask - 1) / kTokensPerTask;
  // Reading the head costs as much as the arithmetic of some rows.
  const int64_t work = (Size(vocab) * width * (Size(rows) + 4)).or_most();
  const int threads = threads_for(work, kProductsPerThread, call.num_threads);
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1)
  for (int64_t n = 0; n < chunks; ++n)
    run(product, n * kTokensPerTask, std::min(vocab, (n + 1) * kTokensPerTask), map, logits,
        call.logits.stride);
  return NABLA_FAST_OK;
}
