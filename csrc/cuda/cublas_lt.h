// Products by NVIDIA's cuBLASLt, which is loaded when the first product is asked for. Nothing links it,
// and its headers are not needed.
#ifndef NABLA_FAST_CUDA_CUBLAS_LT_H_
#define NABLA_FAST_CUDA_CUBLAS_LT_H_

#include "products.h"

namespace nabla_fast::cuda {

// Whether the library is there.
bool cublas_lt_is_there();

// Puts a product into the stream; false if the library is not there or does not take it, and nothing has
// happened then. Both factors have the same dtype.
bool cublas_lt_product(const Product& product, nabla_fast_cuda_stream stream);

}  // namespace nabla_fast::cuda

#endif  // NABLA_FAST_CUDA_CUBLAS_LT_H_
