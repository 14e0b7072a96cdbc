// G of a mix's rows, chunk by chunk of the vocabulary: sum_t <table_t, cotangent_t> + direct, and its sums.
#ifndef NABLA_FAST_CUDA_MIX_GRADIENT_H_
#define NABLA_FAST_CUDA_MIX_GRADIENT_H_

#include "call.h"
#include "gradient_sums.h"
#include "launch.h"
#include "mix_logits.h"
#include "products.h"
#include "slices.h"

namespace nabla_fast::cuda {

// Begins G: with `direct`, or with zeros where it has no data.
template <typename D>
__global__ void __launch_bounds__(kThreads)
    begin_kernel(Rows<const D> direct, Chunk chunk, Rows<float> grad) {
  const SliceOfRow at(chunk);
  Elements elements = {};
  if (direct.data) elements = load_slice(direct.row(at.row), at, 0);
  store_slice(elements, at, grad.row(at.row));
}

struct MixGradient {
  const nabla_fast_mix_args& call;
  nabla_fast_cuda_stream stream;
  int64_t first, rows;
  void* products;  // workspace of products

  // Computes a chunk of G. `grad`: rows of the vocabulary, of which the chunk is there.
  bool compute(const Chunk& chunk, const Rows<float>& grad) const {
    return begin(chunk, grad) && multiply(chunk, grad);
  }

  // Measures a chunk's slices.
  template <typename T>
  bool survey(const Rows<const T>& logits, const Chunk& chunk, const Rows<float>& grad,
              SliceSums* sums, const CutGradient& cut) const {
    return with_flag(call.noise_seed != nullptr, [&](auto noise) {
      return launch({"survey_kernel", stream, rows * chunk.count, kThreads},
                    survey_kernel<T, decltype(noise)::value>, logits, noise_from(call, first),
                    chunk, Temperature(call.tau), {grad.data, grad.stride}, sums, cut);
    });
  }

 private:
  bool begin(const Chunk& chunk, const Rows<float>& grad) const {
    // Products write G where it does not begin with anything.
    if (!call.direct.data && call.table_count > 0) return true;
    const nabla_fast_matrix none = {nullptr, 0, 0, NABLA_FAST_FLOAT32};
    const nabla_fast_matrix& direct = call.direct.data ? call.direct : none;
    return with_element(direct.dtype, [&](auto element) {
      using D = decltype(element);
      const Rows<const D> from =
          direct.data ? rows_from<D>(direct, call.rows, first) : Rows<const D>{nullptr, 0};
      return launch({"begin_kernel", stream, rows * chunk.count, kThreads}, begin_kernel<D>, from,
                    chunk, grad);
    });
  }

  bool multiply(const Chunk& chunk, const Rows<float>& grad) const {
    bool keep = call.direct.data != nullptr;
    for (int64_t t = 0; t < call.table_count; ++t) {
      const nabla_fast_matrix& table = call.tables[t];
      if (!add_product(
              {rows, chunk.tokens(), table.width, factor_of(call.cotangents[t], call.rows, first),
               factor_of(table, call.vocab, chunk.begin()), true, grad.data + chunk.begin(),
               grad.stride, keep, products, product_workspace_bytes()},
              stream))
        return false;
      keep = true;
    }
    return true;
  }
};

}  // namespace nabla_fast::cuda

#endif  // NABLA_FAST_CUDA_MIX_GRADIENT_H_
