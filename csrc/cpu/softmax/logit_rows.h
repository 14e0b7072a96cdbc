// Rows of logits in memory, each by itself: their hard tokens, and the softmax's Jacobian.
#ifndef NABLA_FAST_CPU_SOFTMAX_LOGIT_ROWS_H_
#define NABLA_FAST_CPU_SOFTMAX_LOGIT_ROWS_H_

#include <cstdint>

#include "base/floats.h"
#include "gemm/vocab_tiles.h"
#include "nabla_fast.h"
#include "softmax/relaxed_tiles.h"
#include "softmax/row_status.h"

namespace nabla_fast::softmax {

// The largest y = z + g of a row, or of a part of it.
struct Top {
  float max = -kInfinity;
  int64_t token = -1;  // the first with that y
  bool nan = false;    // whether a y is NaN

  // Adds the part that follows this one.
  void join(const Top& next) {
    nan = nan || next.nan;
    if (next.max > max) {
      max = next.max;
      token = next.token;
    }
  }
  // Of a whole row.
  nabla_fast_status status() const { return row_status(max, nan); }
};

// tops[rows] of the rows, with threads over rows and parts of them. parts: [top_parts(rows,
// vocab)].
void tops_of_rows(const gemm::Table& logits, int64_t rows, int64_t vocab, const NoiseKeys& keys,
                  int32_t num_threads, Top* parts, Top* tops);
int64_t top_parts(int64_t rows, int64_t vocab);

// Numbers of a whole row that its Jacobian needs.
struct JacobianRow {
  float max;     // of y
  float mean;    // <p, G - c>
  float weight;  // 1 / (tau sum e), e = exp((y - max) / tau)
};

// grad = e (grad - mean) weight, [rows, vocab] with grad = G - c; 0 where e is.
void jacobian_of_rows(const gemm::Table& logits, int64_t rows, int64_t vocab, const NoiseKeys& keys,
                      const JacobianRow* of, double tau, float* grad, int64_t grad_stride,
                      int32_t num_threads);

}  // namespace nabla_fast::softmax

#endif  // NABLA_FAST_CPU_SOFTMAX_LOGIT_ROWS_H_
