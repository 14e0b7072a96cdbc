// nabla_fast_lm_logits: hidden states times a head. For few rows the head is read once, at the rate
// of memory, and a bf16 head is never converted as a whole.

#include <algorithm>
#include <cstdint>

#include "base/check.h"
#include "base/isa.h"
#include "base/threads.h"
#include "gemm/dot_products.h"
#include "nabla_fast.h"

namespace nabla_fast::logits {
namespace {

// Tokens between which threads may be split.
constexpr int64_t kTokensPerTask = 512;
// Multiplications worth another thread.
constexpr int64_t kProductsPerThread = 1 << 18;

// All rows with tokens [first, last).
template <int W, typename T>
NABLA_FAST_INLINE void chunk(const gemm::HeadProduct& p, int64_t first, int64_t last, float* logits,
                             int64_t stride) {
  for (int64_t block = first; block < last; block += gemm::kTokensInL2)
    gemm::dot_block<W, T>(p, block, std::min(last, block + gemm::kTokensInL2), logits + block,
                          stride);
}

NABLA_FAST_FOR_EACH_ISA(fp32_chunk, chunk<W, float>)
NABLA_FAST_FOR_EACH_ISA(bf16_chunk, chunk<W, uint16_t>)

}  // namespace
}  // namespace nabla_fast::logits

using namespace nabla_fast;
using namespace nabla_fast::logits;

extern "C" nabla_fast_status nabla_fast_lm_logits(const float* hidden, int64_t rows,
                                                  int64_t hidden_stride, const void* head,
                                                  nabla_fast_dtype head_dtype, int64_t vocab,
                                                  int64_t width, int64_t head_stride, float* logits,
                                                  int64_t logits_stride, int32_t num_threads) {
  if (rows < 0 || vocab < 0 || width < 0) return NABLA_FAST_INVALID_SHAPE;
  if (!is_dtype(head_dtype)) return NABLA_FAST_UNKNOWN_DTYPE;
  if (rows == 0 || vocab == 0) return NABLA_FAST_OK;
  if (!fits({{rows, hidden_stride}, {width, 1}}, 4) ||
      !fits({{rows, logits_stride}, {vocab, 1}}, 4) ||
      !fits({{vocab, head_stride}, {width, 1}}, bytes_of(head_dtype)))
    return NABLA_FAST_TOO_LARGE;
  if (!logits || (width > 0 && (!hidden || !head))) return NABLA_FAST_INVALID_POINTER;
  head_stride = step_of(vocab, head_stride);
  gemm::HeadProduct product{hidden, rows, hidden_stride, head, vocab, width, head_stride};
  auto* const run = (head_dtype == NABLA_FAST_FLOAT32 ? fp32_chunk : bf16_chunk).select();
  int64_t chunks = (vocab + kTokensPerTask - 1) / kTokensPerTask;
  // Reading the head costs as much as the arithmetic of some rows.
  const int64_t work = (Size(vocab) * width * (Size(rows) + 4)).or_most();
  const int threads = threads_for(work, kProductsPerThread, num_threads);
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1)
  for (int64_t n = 0; n < chunks; ++n)
    run(product, n * kTokensPerTask, std::min(vocab, (n + 1) * kTokensPerTask), logits,
        logits_stride);
  return NABLA_FAST_OK;
}
