// Temperature, top-k and top-p of a row of logits, as transformers orders them.
#ifndef NABLA_FAST_CPU_INTERNAL_TOKEN_FILTER_H_
#define NABLA_FAST_CPU_INTERNAL_TOKEN_FILTER_H_

#include <cstdint>

namespace nabla_fast::internal {

// The tokens that are left, ascending, and their probabilities softmax(top_p(top_k(logits / T))).
//
//   logits         [vocab] float or double
//   top_k          from 1 to vocab - 1; tokens that tie with the k-th are kept too
//   top_p          in (0, 1]; of equally likely tokens those of lower index are dropped first
//   tokens         [2 * capacity], capacity at least top_k; the second half is worked in
//   probabilities  [capacity]
//
// Returns how many are left, or -1 where there are more ties than room, or a NaN.
template <typename T>
int64_t filter_tokens(const T* logits, int64_t vocab, double temperature, int64_t top_k,
                      double top_p, int64_t* tokens, T* probabilities, int64_t capacity);

}  // namespace nabla_fast::internal

#endif  // NABLA_FAST_CPU_INTERNAL_TOKEN_FILTER_H_
