// Flushing results below 2^-126 to 0, on CPUs that can: arithmetic on them is several times slower.
#ifndef NABLA_FAST_CPU_FLUSH_H_
#define NABLA_FAST_CPU_FLUSH_H_

#include "isa.h"

namespace nabla_fast::cpu {

// Holds for the thread that made it, until it is destroyed. Inputs are read as they are.
class FlushToZero {
 public:
  explicit FlushToZero(bool flush) : flush_(flush) {
#if NABLA_FAST_X86
    if (!flush_) return;
    before_ = __builtin_ia32_stmxcsr();
    __builtin_ia32_ldmxcsr(before_ | 0x8000);
#endif
  }
  ~FlushToZero() {
#if NABLA_FAST_X86
    if (flush_) __builtin_ia32_ldmxcsr(before_);
#endif
  }
  FlushToZero(const FlushToZero&) = delete;
  FlushToZero& operator=(const FlushToZero&) = delete;

 private:
  const bool flush_;
  unsigned before_ = 0;
};

}  // namespace nabla_fast::cpu

#endif  // NABLA_FAST_CPU_FLUSH_H_
