// Logits of a mix's rows, chunk by chunk of the vocabulary: the caller's, or products of hidden states
// with a head, of which one chunk exists at a time.
#ifndef NABLA_FAST_CUDA_MIX_LOGITS_H_
#define NABLA_FAST_CUDA_MIX_LOGITS_H_

#include "call.h"
#include "products.h"
#include "slices.h"

namespace nabla_fast::cuda {

inline bool is_linear(const nabla_fast_mix_args& call) { return call.logits.data == nullptr; }

inline nabla_fast_dtype logits_dtype(const nabla_fast_mix_args& call) {
  return is_linear(call) ? static_cast<nabla_fast_dtype>(NABLA_FAST_FLOAT32) : call.logits.dtype;
}

// Elements that rows of a chunk's arrays lie apart, so that each begins at a multiple of 16 bytes.
inline int64_t chunk_stride(const nabla_fast_mix_args& call, int64_t slices) {
  return Size(std::min(slices * kSliceTokens, call.vocab)).rounded_up(8).or_zero();
}

// Rows of a chunk's array, whose element 0 is the chunk's first token, as rows of the vocabulary.
template <typename T>
Rows<T> from_token_0(T* array, int64_t stride, const Chunk& chunk) {
  return {array - chunk.begin(), stride};
}

// Rows [first, first + rows) of a matrix in rows of `columns`, from row `from` on of these.
inline Factor factor_of(const nabla_fast_matrix& matrix, int64_t rows, int64_t from) {
  const int64_t stride = stride_of(matrix, rows);
  return {static_cast<const char*>(matrix.data) + from * stride * bytes_of(matrix.dtype), stride,
          matrix.dtype};
}

struct MixLogits {
  const nabla_fast_mix_args& call;
  int64_t first, rows;
  float* chunk_logits;  // [rows, stride], of hidden states
  int64_t stride;
  void* products;  // workspace of products

  // Computes a chunk's logits, if they are not there.
  bool prepare(const Chunk& chunk, nabla_fast_cuda_stream stream) const {
    if (!is_linear(call)) return true;
    return add_product(
        {rows, chunk.tokens(), call.head.width, factor_of(call.hidden, call.rows, first),
         factor_of(call.head, call.vocab, chunk.begin()), true, chunk_logits, stride, false,
         products, product_workspace_bytes()},
        stream);
  }

  // The rows of the vocabulary, of which a chunk is there. T is the element of logits_dtype().
  template <typename T>
  Rows<const T> of(const Chunk& chunk) const {
    if (!is_linear(call)) return rows_from<T>(call.logits, call.rows, first);
    return from_token_0(reinterpret_cast<const T*>(chunk_logits), stride, chunk);
  }

  // Calls visit with a zero of the logits' type, and whether there is noise.
  template <typename Visit>
  bool with_types(const Visit& visit) const {
    return with_element(logits_dtype(call), [&](auto element) {
      return with_flag(call.noise_seed != nullptr,
                       [&](auto noise) { return visit(element, noise); });
    });
  }
};

}  // namespace nabla_fast::cuda

#endif  // NABLA_FAST_CUDA_MIX_LOGITS_H_
