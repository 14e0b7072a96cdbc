// Fetching what will be needed next.
#ifndef NABLA_FAST_CPU_AHEAD_H_
#define NABLA_FAST_CPU_AHEAD_H_

#include "isa.h"

namespace nabla_fast::cpu {

// Walks through the memory behind what is worked on, into the second-level cache, at the pace of
// the work: the hardware's own fetching leaves memory idle during arithmetic. A fetch is no access:
// behind the end of a table it does nothing.
struct Ahead {
  const char* at;

  NABLA_FAST_INLINE void line() {
    __builtin_prefetch(at, 0, 2);
    at += 64;
  }
  // As many bytes as the work uses up meanwhile, in whole lines.
  template <int kBytes>
  NABLA_FAST_INLINE void walk() {
#pragma GCC unroll 16
    for (int bytes = 0; bytes < kBytes; bytes += 64) line();
  }
};

}  // namespace nabla_fast::cpu

#endif  // NABLA_FAST_CPU_AHEAD_H_
