// Large pages for new memory: a kernel that fills a matrix of [rows, vocabulary] otherwise spends
// a tenth of its time on faults of small ones.
#ifndef NABLA_FAST_PYTHON_PAGES_H_
#define NABLA_FAST_PYTHON_PAGES_H_

#include <cstdint>

#if defined(__linux__)
  #include <sys/mman.h>
#endif

namespace nabla_fast::bindings {

// Asks for large pages in `bytes` bytes that have not been written yet. A hint: where the system
// gives none, small ones come as before.
inline void advise_large_pages(void* memory, int64_t bytes) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  constexpr uintptr_t kPage = uintptr_t{2} << 20;
  constexpr int64_t kLeast = int64_t{4} << 20;  // below, memory may be part of a heap
  if (bytes < kLeast) return;
  const auto address = reinterpret_cast<uintptr_t>(memory);
  const uintptr_t begin = (address + kPage - 1) / kPage * kPage;
  const uintptr_t end = (address + static_cast<uintptr_t>(bytes)) / kPage * kPage;
  if (begin < end) (void)madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#else
  (void)memory;
  (void)bytes;
#endif
}

}  // namespace nabla_fast::bindings

#endif  // NABLA_FAST_PYTHON_PAGES_H_
