// Products of matrices in device memory, summed in float32.
#ifndef NABLA_FAST_CUDA_PRODUCTS_H_
#define NABLA_FAST_CUDA_PRODUCTS_H_

#include <cstdint>

#include "nabla_fast_cuda.h"

namespace nabla_fast::cuda {

// A matrix whose rows lie `stride` elements apart.
struct Factor {
  const void* data;
  int64_t stride;
  nabla_fast_dtype dtype;
};

// out[n, m] = sum_k left[n, k] right[k, m], or right[m, k] if `transposed`; added to what is there if
// `keep`.
struct Product {
  int64_t rows, columns, inner;
  Factor left, right;
  bool transposed;
  float* out;
  int64_t out_stride;
  bool keep;
  void* workspace;  // at a multiple of 256 bytes
  int64_t workspace_bytes;
};

// Bytes of a workspace that products are given: as many as the vendor's library makes use of on today's
// devices, for few rows above all, whose long sums it shares out over the device; none where it is absent.
int64_t product_workspace_bytes();

// Puts the product into the stream; false if the device has refused it.
bool add_product(const Product& product, nabla_fast_cuda_stream stream);

}  // namespace nabla_fast::cuda

#endif  // NABLA_FAST_CUDA_PRODUCTS_H_
