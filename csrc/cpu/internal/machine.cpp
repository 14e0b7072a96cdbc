#include "internal/machine.h"

#include <algorithm>
#include <cstdint>

#include "base/isa.h"
#include "base/threads.h"
#include "simd/vec.h"

#if NABLA_FAST_AMX && !NABLA_FAST_EMULATED
  #include <immintrin.h>
#endif

namespace nabla_fast::internal {
namespace {

// Bytes from a read to the memory being prefetched, and places read at once: one stream leaves
// memory idle.
constexpr int64_t kPrefetchBytes = 1024;
constexpr int kStreams = 8;
// Floats of a cache line; a thread's part begins at a multiple of it.
constexpr int64_t kLineFloats = 16;

// -- one thread -----------------------------------------------------------------------------------

template <int W>
NABLA_FAST_INLINE double read_kernel(const float* x, int64_t n) {
  const int64_t stream = n / (kStreams * kLineFloats) * kLineFloats;
  Floats<W> sum[kStreams] = {};
  for (int64_t k = 0; k < stream; k += kLineFloats) {
#pragma GCC unroll 8
    for (int s = 0; s < kStreams; ++s) {
      const float* line = x + s * stream + k;
      // An address, not an access: behind the end it does nothing.
      __builtin_prefetch(reinterpret_cast<const char*>(line) + kPrefetchBytes);
#pragma GCC unroll 4
      for (int part = 0; part < kLineFloats; part += W) sum[s] += load<W>(line + part);
    }
  }
  double total = 0;
  for (const Floats<W>& one : sum) total += lane_sum<W>(one);
  for (int64_t i = kStreams * stream; i < n; ++i) total += x[i];
  return total;
}

// y[0..W) = x without a place in a cache: what is only written need not be read first.
template <int W>
NABLA_FAST_INLINE void store_past_caches(float* y, Floats<W> x) {
#if NABLA_FAST_X86
  typedef float Aligned __attribute__((vector_size(4 * W), may_alias));
  Aligned* to = reinterpret_cast<Aligned*>(y);
  if constexpr (W == 16 && NABLA_FAST_AVX512)
    asm volatile("vmovntps %1, %0" : "=m"(*to) : "v"(x));
  else if constexpr (W == 8 && NABLA_FAST_AVX2)
    asm volatile("vmovntps %1, %0" : "=m"(*to) : "x"(x));
  else if constexpr (W == 4)
    asm volatile("movntps %1, %0" : "=m"(*to) : "x"(x));
  else
    *to = x;
#else
  store<W>(y, x);
#endif
}

template <int W>
NABLA_FAST_INLINE void triad_kernel(float* a, const float* b, const float* c, float s, int64_t n) {
  const Floats<W> factor = splat<W>(s);
  int64_t i = 0;
  for (; i + kLineFloats <= n; i += kLineFloats) {
    __builtin_prefetch(reinterpret_cast<const char*>(b + i) + kPrefetchBytes);
    __builtin_prefetch(reinterpret_cast<const char*>(c + i) + kPrefetchBytes);
#pragma GCC unroll 4
    for (int64_t k = i; k < i + kLineFloats; k += W)
      store_past_caches<W>(a + k, load<W>(b + k) + factor * load<W>(c + k));
  }
  for (; i < n; ++i) a[i] = b[i] + s * c[i];
#if NABLA_FAST_X86
  __builtin_ia32_sfence();
#endif
}

// Sums in registers that do not wait for each other: more than an operation takes cycles times the
// operations a cycle, and no more than there are registers.
template <int W>
constexpr int kIndependentSums = W == 16 ? 24 : 12;
constexpr int kUnrolled = 8;

template <int W>
NABLA_FAST_INLINE void keep(Floats<W>& x) {
#if NABLA_FAST_X86
  if constexpr (W == 16 && NABLA_FAST_AVX512)
    asm volatile("" : "+v"(x));
  else if constexpr (W == 4 || (W == 8 && NABLA_FAST_AVX2))
    asm volatile("" : "+x"(x));
  else
    asm volatile("" : "+m"(x));
#else
  asm volatile("" : "+m"(x));
#endif
}

template <int W>
NABLA_FAST_INLINE double multiply_adds_kernel(int64_t rounds) {
  Floats<W> sum[kIndependentSums<W>] = {}, factor = splat<W>(0.5f), term = splat<W>(1.0f);
  keep<W>(factor);
  keep<W>(term);
  // Equal sums would be computed once.
#pragma GCC unroll 24
  for (int c = 0; c < kIndependentSums<W>; ++c) keep<W>(sum[c]);
  for (int64_t n = 0; n < rounds; ++n) {
#pragma GCC unroll 8
    for (int u = 0; u < kUnrolled; ++u) {
#pragma GCC unroll 24
      for (int c = 0; c < kIndependentSums<W>; ++c) sum[c] = sum[c] * factor + term;
    }
  }
#pragma GCC unroll 24
  for (int c = 0; c < kIndependentSums<W>; ++c) keep<W>(sum[c]);
  return 2.0 * W * kIndependentSums<W> * kUnrolled * static_cast<double>(rounds);
}

NABLA_FAST_FOR_EACH_ISA(read, read_kernel<W>)
NABLA_FAST_FOR_EACH_ISA(triad, triad_kernel<W>)
NABLA_FAST_FOR_EACH_ISA(multiply_adds, multiply_adds_kernel<W>)

#if NABLA_FAST_X86 && !NABLA_FAST_EMULATED
NABLA_FAST_TARGET_AVX512 double dot_products(int64_t rounds) {
  constexpr int kSums = kIndependentSums<16>;
  // Zeros: the instruction takes as long whatever the numbers are.
  Floats<16> sum[kSums] = {}, a = {}, b = {};
  keep<16>(a);
  keep<16>(b);
  for (int64_t n = 0; n < rounds; ++n) {
  #pragma GCC unroll 8
    for (int u = 0; u < kUnrolled; ++u) {
  #pragma GCC unroll 24
      for (int c = 0; c < kSums; ++c)
        // The intrinsic would have to be called from functions of its own instruction set.
        asm volatile("vdpbf16ps %2, %1, %0" : "+v"(sum[c]) : "v"(a), "v"(b));
    }
  }
  return 4.0 * 16 * kSums * kUnrolled * static_cast<double>(rounds);
}
#endif

#if NABLA_FAST_AMX && !NABLA_FAST_EMULATED
// Eight tiles of 16 rows of 64 bytes. Static: of a local one the compiler may leave out what the
// intrinsic does not say it reads, all but its first bytes.
alignas(64) constexpr uint8_t kTiles[64] = {
    1,  0,  0,  0,  0,  0,  0,  0,  0,  0, 0,  0, 0,  0, 0,  0,  // palette
    64, 0,  64, 0,  64, 0,  64, 0,  64, 0, 64, 0, 64, 0, 64, 0,  // bytes of a row
    0,  0,  0,  0,  0,  0,  0,  0,  0,  0, 0,  0, 0,  0, 0,  0,  //
    16, 16, 16, 16, 16, 16, 16, 16, 0,  0, 0,  0, 0,  0, 0,  0,  // rows
};

// Four tiles of sums from two of either side, all resident. Loading the sides from the first-level
// cache at each step measured the same rate.
NABLA_FAST_TARGET_AMX double tile_products(int64_t rounds) {
  _tile_loadconfig(kTiles);
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
  _tile_zero(4);
  _tile_zero(5);
  _tile_zero(6);
  _tile_zero(7);
  for (int64_t n = 0; n < rounds; ++n) {
  #pragma GCC unroll 8
    for (int u = 0; u < kUnrolled; ++u) {
      _tile_dpbf16ps(0, 4, 6);
      _tile_dpbf16ps(1, 4, 7);
      _tile_dpbf16ps(2, 5, 6);
      _tile_dpbf16ps(3, 5, 7);
    }
  }
  _tile_release();
  return 2.0 * 16 * 16 * 32 * 4 * kUnrolled * static_cast<double>(rounds);
}
#endif

// -- all threads ----------------------------------------------------------------------------------

// A thread's part of n elements.
struct Part {
  int64_t first, last;
};

Part part_of(int64_t n) {
  const int64_t size = (n / thread_count() + kLineFloats) / kLineFloats * kLineFloats;
  const int64_t first = std::min(n, size * thread_rank());
  return {first, std::min(n, first + size)};
}

double in_all_threads(double (*work)(int64_t), int64_t rounds, int threads) {
  double operations = 0;
#pragma omp parallel num_threads(threads) reduction(+ : operations)
  operations += work(rounds);
  static_cast<void>(threads);
  return operations;
}

}  // namespace

double machine_read(const float* x, int64_t n, int threads) {
  auto* run = read.select();
  double total = 0;
#pragma omp parallel num_threads(threads) reduction(+ : total)
  {
    const Part part = part_of(n);
    total += run(x + part.first, part.last - part.first);
  }
  static_cast<void>(threads);
  return total;
}

void machine_triad(float* a, const float* b, const float* c, float s, int64_t n, int threads) {
  auto* run = triad.select();
#pragma omp parallel num_threads(threads)
  {
    const auto [first, last] = part_of(n);
    run(a + first, b + first, c + first, s, last - first);
  }
  static_cast<void>(threads);
}

double machine_multiply_adds(int64_t rounds, int threads) {
  return in_all_threads(multiply_adds.select(), rounds, threads);
}

double machine_dot_products(int64_t rounds, int threads) {
#if NABLA_FAST_X86 && !NABLA_FAST_EMULATED
  if (nabla_fast_cpu_isa() >= NABLA_FAST_ISA_AVX512_BF16)
    return in_all_threads(dot_products, rounds, threads);
#endif
  static_cast<void>(rounds);
  static_cast<void>(threads);
  return 0;
}

double machine_tile_products(int64_t rounds, int threads) {
#if NABLA_FAST_AMX && !NABLA_FAST_EMULATED
  if (nabla_fast_cpu_isa() >= NABLA_FAST_ISA_AMX)
    return in_all_threads(tile_products, rounds, threads);
#endif
  static_cast<void>(rounds);
  static_cast<void>(threads);
  return 0;
}

}  // namespace nabla_fast::internal
