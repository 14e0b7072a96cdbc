// Prefetching of memory that will be read next.
#ifndef NABLA_FAST_CPU_BASE_PREFETCH_H_
#define NABLA_FAST_CPU_BASE_PREFETCH_H_

#include "base/isa.h"

namespace nabla_fast {

// Prefetcher of the memory behind what is being read, into the second-level cache and at the pace
// of the reads: the hardware's own prefetcher leaves memory idle during arithmetic. A prefetch is
// no access: behind the end of a table it does nothing.
//
// Four pages advance together: in one after the other, every prefetch would wait for the address
// translation of the one before it.
struct Prefetcher {
  const char* next;
  int line_of_page = 0;  // the same in all four pages
  int pending = 0;       // lines, fewer than four

  NABLA_FAST_INLINE void add_line() { add_lines(1); }
  // `kBytes`, as many as are read meanwhile, in whole lines.
  template <int kBytes>
  NABLA_FAST_INLINE void advance() {
    constexpr int kLines = (kBytes + 63) / 64;
#pragma GCC unroll 16
    for (int n = 0; n < kLines / 4; ++n) fetch_four_lines();
    if constexpr (kLines % 4 > 0) add_lines(kLines % 4);
  }
  NABLA_FAST_INLINE void add_lines(int lines) {
    pending += lines;
    if (pending < 4) return;
    pending -= 4;
    fetch_four_lines();
  }
  NABLA_FAST_INLINE void fetch_four_lines() {
    constexpr int kPage = 4096;
#pragma GCC unroll 4
    for (int page = 0; page < 4; ++page) __builtin_prefetch(next + page * kPage, 0, 2);
    next += 64;
    if (++line_of_page < kPage / 64) return;
    line_of_page = 0;
    next += 3 * kPage;
  }
};

// The same memory in order, a few lines at a time between pieces of arithmetic: more of them in a row
// would wait for each other, and the arithmetic for them.
struct LinePrefetcher {
  const char* next;
  int lines;  // at a time

  NABLA_FAST_INLINE void advance() {
    for (int n = 0; n < lines; ++n, next += 64) __builtin_prefetch(next, 0, 2);
  }
};

}  // namespace nabla_fast

#endif  // NABLA_FAST_CPU_BASE_PREFETCH_H_
