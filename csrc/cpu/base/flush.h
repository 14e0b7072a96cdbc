// Results below 2^-126 as 0, on CPUs that can: arithmetic on them is several times slower.
#ifndef NABLA_FAST_CPU_BASE_FLUSH_H_
#define NABLA_FAST_CPU_BASE_FLUSH_H_

#include "base/isa.h"

namespace nabla_fast {

// Holds for the thread that made it, until it is destroyed. Inputs are read as they are.
class FlushToZero {
 public:
#if NABLA_FAST_X86
  explicit FlushToZero(bool flush) : before_(__builtin_ia32_stmxcsr()) {
    if (flush) __builtin_ia32_ldmxcsr(before_ | 0x8000);
  }
  ~FlushToZero() { __builtin_ia32_ldmxcsr(before_); }
#else
  explicit FlushToZero(bool) {}
#endif
  FlushToZero(const FlushToZero&) = delete;
  FlushToZero& operator=(const FlushToZero&) = delete;

 private:
#if NABLA_FAST_X86
  const unsigned before_;
#endif
};

}  // namespace nabla_fast

#endif  // NABLA_FAST_CPU_BASE_FLUSH_H_
