// Fetching what will be needed next.
#ifndef NABLA_FAST_CPU_BASE_PREFETCH_H_
#define NABLA_FAST_CPU_BASE_PREFETCH_H_

#include "base/isa.h"

namespace nabla_fast {

// Walks through the memory behind what is worked on, into the second-level cache, at the pace of
// the work: the hardware's own fetching leaves memory idle during arithmetic. A fetch is no access:
// behind the end of a table it does nothing.
//
// Four pages are walked through at a time: in one after the other, every fetch would wait while the
// page of the one before it is looked up.
struct Ahead {
  const char* at;
  int column = 0;  // line of the four pages
  int owed = 0;    // lines, fewer than four

  NABLA_FAST_INLINE void line() { owe(1); }
  // As many bytes as the work uses up meanwhile, in whole lines.
  template <int kBytes>
  NABLA_FAST_INLINE void walk() {
    constexpr int kLines = (kBytes + 63) / 64;
#pragma GCC unroll 16
    for (int n = 0; n < kLines / 4; ++n) four_lines();
    if constexpr (kLines % 4 > 0) owe(kLines % 4);
  }
  NABLA_FAST_INLINE void owe(int lines) {
    owed += lines;
    if (owed < 4) return;
    owed -= 4;
    four_lines();
  }
  NABLA_FAST_INLINE void four_lines() {
    constexpr int kPage = 4096;
#pragma GCC unroll 4
    for (int page = 0; page < 4; ++page) __builtin_prefetch(at + page * kPage, 0, 2);
    at += 64;
    if (++column < kPage / 64) return;
    column = 0;
    at += 3 * kPage;
  }
};

}  // namespace nabla_fast

#endif  // NABLA_FAST_CPU_BASE_PREFETCH_H_
