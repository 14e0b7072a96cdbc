// Number of threads for a call, and where one stands among those of a parallel region.
#ifndef NABLA_FAST_CPU_BASE_THREADS_H_
#define NABLA_FAST_CPU_BASE_THREADS_H_

#include <algorithm>
#include <cstdint>

#ifdef _OPENMP
  #include <omp.h>
#endif

namespace nabla_fast {

// Most threads of a call, whatever it asks for: OpenMP ends the process where it cannot create a
// thread.
constexpr int64_t kMaxThreads = 1024;

// A thread for every `work_per_thread` of `work`, at least one, at most `asked`; OpenMP's own
// choice is the most where `asked` is 0 or less.
inline int threads_for(int64_t work, int64_t work_per_thread, int32_t asked) {
#ifdef _OPENMP
  // Asking for the number of threads costs as much as a small call.
  if (work < 2 * work_per_thread) return 1;
  const int64_t most = asked > 0 ? std::min<int64_t>(asked, kMaxThreads) : omp_get_max_threads();
#else
  const int64_t most = 1;
  static_cast<void>(asked);
#endif
  return static_cast<int>(std::clamp<int64_t>(work / work_per_thread, 1, most));
}

// Rank of this thread in its parallel region, and the number of threads there.
#ifdef _OPENMP
inline int thread_rank() { return omp_get_thread_num(); }
inline int thread_count() { return omp_get_num_threads(); }
#else
inline int thread_rank() { return 0; }
inline int thread_count() { return 1; }
#endif

}  // namespace nabla_fast

#endif  // NABLA_FAST_CPU_BASE_THREADS_H_
