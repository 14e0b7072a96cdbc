// Categorical draws as torch.multinomial makes them from a CPU generator: argmax of p / q over
// exponentials q, one for every token of the vocabulary, whether it can be drawn or not.
#ifndef NABLA_FAST_CPU_INTERNAL_EXPONENTIAL_RACE_H_
#define NABLA_FAST_CPU_INTERNAL_EXPONENTIAL_RACE_H_

#include <cstdint>

namespace nabla_fast::internal {

// The generator's words, as at the head of torch.Generator.get_state() after the 64-bit seed.
struct Mt19937 {
  int32_t left;  // words until the state must be renewed, counted from 1
  int32_t seeded;
  uint64_t next;  // index of the next word
  uint64_t state[624];
};

// One token, and the generator left behind the vocabulary's draws. Only the draws of `tokens` are
// turned into exponentials: of the others, the generator's words are passed over.
//
//   vocab          tokens that torch.multinomial would draw for
//   tokens         [count] those of probability above 0, ascending
//   probabilities  [count] float or double
template <typename T>
int64_t exponential_race(Mt19937* generator, int64_t vocab, const int64_t* tokens,
                         const T* probabilities, int64_t count);

}  // namespace nabla_fast::internal

#endif  // NABLA_FAST_CPU_INTERNAL_EXPONENTIAL_RACE_H_
