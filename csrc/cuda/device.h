// What kernels ask of the device in other words than C++: barriers, shuffles, shared memory,
// conversions, wide loads. Every function has two bodies: the device's, which holds all PTX there is,
// and the host's, for kernels that run on the CPU (host/).
#ifndef NABLA_FAST_CUDA_DEVICE_H_
#define NABLA_FAST_CUDA_DEVICE_H_

#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>

#if defined(__CUDACC__)
  #include <cooperative_groups.h>
#else
  #include "host/cuda.h"
#endif

#define NABLA_FAST_DEVICE __device__ __forceinline__

// Before a loop: unrolled, so that arrays which it indexes stay in registers.
#if defined(__CUDACC__)
  #define NABLA_FAST_UNROLL _Pragma("unroll")
#else
  #define NABLA_FAST_UNROLL
#endif

// Before a loop: kept as it is, where registers have no room for several turns at once.
#if defined(__CUDACC__)
  #define NABLA_FAST_KEEP_LOOP _Pragma("unroll 1")
#else
  #define NABLA_FAST_KEEP_LOOP
#endif

// Declares a variable in the block's shared memory, without content. On the host it is a reference:
// `key` has an address of its own for each declaration.
#if defined(__CUDACC__)
  #define NABLA_FAST_SHARED(type, name) __shared__ type name
#else
  #define NABLA_FAST_SHARED(type, name) \
    static char name##_key;             \
    type& name =                        \
        *static_cast<type*>(::nabla_fast::host::shared_variable(&name##_key, sizeof(type), #name))
#endif

namespace nabla_fast::cuda {

constexpr unsigned kWarpThreads = 32;
constexpr unsigned kAllLanes = 0xFFFFFFFFu;

// Whether the code that is compiled now is for devices with thread-block clusters.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 900
constexpr bool kHasClusters = false;
#else
constexpr bool kHasClusters = true;
#endif

// threadIdx.x, read again wherever it stands: what is computed from it is not kept in registers meanwhile.
NABLA_FAST_DEVICE int thread_anew() {
#if defined(__CUDACC__)
  int thread;
  asm volatile("mov.u32 %0, %%tid.x;" : "=r"(thread));
  return thread;
#else
  return static_cast<int>(threadIdx.x);
#endif
}

// -- barriers -------------------------------------------------------------------------------------

NABLA_FAST_DEVICE void sync_warp() {
#if defined(__CUDACC__)
  __syncwarp();
#else
  host::barrier(host::kWarp);
#endif
}

NABLA_FAST_DEVICE void sync_block() {
#if defined(__CUDACC__)
  __syncthreads();
#else
  host::barrier(host::kBlock);
#endif
}

// Of all threads of a thread-block cluster; sm_90 and later.
NABLA_FAST_DEVICE void sync_cluster() {
#if !defined(__CUDACC__)
  host::barrier(host::kCluster);
#elif __CUDA_ARCH__ >= 900
  asm volatile("barrier.cluster.arrive.aligned;\n\tbarrier.cluster.wait.aligned;" ::: "memory");
#endif
}

// Of all threads of a cooperative grid.
NABLA_FAST_DEVICE void sync_grid() {
#if defined(__CUDACC__)
  cooperative_groups::this_grid().sync();
#else
  host::barrier(host::kGrid);
#endif
}

// -- shared memory --------------------------------------------------------------------------------

// The dynamic shared memory of the launch.
NABLA_FAST_DEVICE void* dynamic_shared() {
#if defined(__CUDACC__)
  extern __shared__ __align__(128) unsigned char nabla_fast_dynamic_shared[];
  return nabla_fast_dynamic_shared;
#else
  return host::dynamic_shared();
#endif
}

// The same variable in the shared memory of another block of the cluster; sm_90 and later.
template <typename T>
NABLA_FAST_DEVICE T* shared_of(T* variable, unsigned rank) {
#if !defined(__CUDACC__)
  return static_cast<T*>(host::shared_of(variable, rank));
#elif __CUDA_ARCH__ >= 900
  uint64_t there;
  asm("mapa.u64 %0, %1, %2;" : "=l"(there) : "l"(variable), "r"(rank));
  return reinterpret_cast<T*>(there);
#else
  return variable;
#endif
}

// -- copies into shared memory --------------------------------------------------------------------

// Counts bytes that bulk copies bring, of one thread that expects them. It passes when all have come,
// again and again. sm_90 and later.
struct alignas(8) CopyBarrier {
  uint64_t word;
};

#if defined(__CUDACC__)
NABLA_FAST_DEVICE uint32_t shared_address(const void* variable) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(variable));
}
#endif

// By one thread; the others of its block may use the barrier after one of the block.
NABLA_FAST_DEVICE void init_copies(CopyBarrier* barrier) {
#if !defined(__CUDACC__)
  host::init_copies(barrier);
#elif __CUDA_ARCH__ >= 900
  asm volatile("mbarrier.init.shared::cta.b64 [%0], 1;\n\tfence.proxy.async.shared::cta;" ::"r"(
                   shared_address(barrier))
               : "memory");
#endif
}

// The barrier passes when so many bytes have come.
NABLA_FAST_DEVICE void expect_copies(CopyBarrier* barrier, uint32_t bytes) {
#if !defined(__CUDACC__)
  host::expect_copies(barrier, bytes);
#elif __CUDA_ARCH__ >= 900
  asm volatile(
      "mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(barrier)),
      "r"(bytes)
      : "memory");
#endif
}

// Starts a copy from global to shared memory. Addresses and bytes are multiples of 16.
NABLA_FAST_DEVICE void bulk_copy(void* to, const void* from, uint32_t bytes, CopyBarrier* barrier) {
#if !defined(__CUDACC__)
  host::bulk_copy(to, from, bytes, barrier);
#elif __CUDA_ARCH__ >= 900
  asm volatile(
      "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::
          "r"(shared_address(to)),
      "l"(__cvta_generic_to_global(from)), "r"(bytes), "r"(shared_address(barrier))
      : "memory");
#endif
}

// Waits until the barrier has passed: the first time for parity 0, then in turns. Every thread that reads
// what has come has to wait itself.
NABLA_FAST_DEVICE void wait_for_copies(CopyBarrier* barrier, uint32_t parity) {
#if !defined(__CUDACC__)
  host::wait_for_copies(barrier, parity);
#elif __CUDA_ARCH__ >= 900
  uint32_t passed;
  do {
    asm volatile(
        "{\n\t.reg .pred p;\n\tmbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2;\n\t"
        "selp.u32 %0, 1, 0, p;\n\t}"
        : "=r"(passed)
        : "r"(shared_address(barrier)), "r"(parity)
        : "memory");
  } while (!passed);
#endif
}

// Starts a copy of 16 bytes from global to shared memory, of a group that its thread waits for. Addresses
// are multiples of 16.
NABLA_FAST_DEVICE void copy_16(void* to, const void* from) {
#if defined(__CUDACC__)
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(shared_address(to)),
               "l"(__cvta_generic_to_global(from))
               : "memory");
#else
  host::copy_16(to, from);
#endif
}

NABLA_FAST_DEVICE void end_copy_group() {
#if defined(__CUDACC__)
  asm volatile("cp.async.commit_group;" ::: "memory");
#else
  host::end_copy_group();
#endif
}

// Waits until at most so many groups of this thread are under way.
template <int kLeft>
NABLA_FAST_DEVICE void wait_for_copy_groups() {
#if defined(__CUDACC__)
  asm volatile("cp.async.wait_group %0;" ::"n"(kLeft) : "memory");
#else
  host::wait_for_copy_groups(kLeft);
#endif
}

// -- lanes of a warp ------------------------------------------------------------------------------

// The value of the lane whose number differs from this one's in the bits of `lanes`.
template <typename T>
NABLA_FAST_DEVICE T shuffle_xor(T value, unsigned lanes) {
#if defined(__CUDACC__)
  return __shfl_xor_sync(kAllLanes, value, lanes);
#else
  static_assert(sizeof(T) <= sizeof(uint64_t));
  uint64_t word = 0;
  std::memcpy(&word, &value, sizeof value);
  word = host::exchange(threadIdx.x % kWarpThreads ^ lanes, word);
  std::memcpy(&value, &word, sizeof value);
  return value;
#endif
}

// The lanes of `mask`, this one among them, in which `value` is true.
NABLA_FAST_DEVICE unsigned ballot(unsigned mask, bool value) {
#if defined(__CUDACC__)
  return __ballot_sync(mask, value);
#else
  return host::ballot(mask, value);
#endif
}

// -- numbers --------------------------------------------------------------------------------------

NABLA_FAST_DEVICE uint32_t bits_of(float x) {
#if defined(__CUDACC__)
  return __float_as_uint(x);
#else
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  return bits;
#endif
}

NABLA_FAST_DEVICE float float_of(uint32_t bits) {
#if defined(__CUDACC__)
  return __uint_as_float(bits);
#else
  float x;
  std::memcpy(&x, &bits, sizeof x);
  return x;
#endif
}

// 2^x within 2 ulp; results below 2^-126 are 0.
NABLA_FAST_DEVICE float exp2_approx(float x) {
#if defined(__CUDACC__)
  float power;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(power) : "f"(x));
  return power;
#else
  const float power = std::exp2(x);
  return power < 0x1p-126f ? 0 : power;
#endif
}

// sqrt(x) within 1 ulp or so; of what is below 2^-126 it is 0.
NABLA_FAST_DEVICE float sqrt_approx(float x) {
#if defined(__CUDACC__)
  float root;
  asm("sqrt.approx.ftz.f32 %0, %1;" : "=f"(root) : "f"(x));
  return root;
#else
  return x < 0x1p-126f ? 0 : std::sqrt(x);
#endif
}

// a / b within 2 ulp, for b of 2^-126 to 2^126; what is below 2^-126 counts as 0.
NABLA_FAST_DEVICE float divide_approx(float a, float b) {
#if defined(__CUDACC__)
  float quotient;
  asm("div.approx.ftz.f32 %0, %1, %2;" : "=f"(quotient) : "f"(a), "f"(b));
  return quotient;
#else
  if (std::fabs(a) < 0x1p-126f) return 0;
  const float quotient = a / b;
  return std::fabs(quotient) < 0x1p-126f ? 0 : quotient;
#endif
}

// The larger of two numbers; NaN if one of them is.
NABLA_FAST_DEVICE float max_or_nan(float a, float b) {
#if defined(__CUDACC__)
  float max;
  asm("max.NaN.f32 %0, %1, %2;" : "=f"(max) : "f"(a), "f"(b));
  return max;
#else
  if (a != a || b != b) return __builtin_nanf("");
  return a > b ? a : b;
#endif
}

// bfloat16: the upper half of a float32.
struct bfloat16 {
  uint16_t bits;
};

// IEEE 754 half precision.
struct float16 {
  uint16_t bits;
};

NABLA_FAST_DEVICE float to_float(float x) { return x; }
NABLA_FAST_DEVICE float to_float(bfloat16 x) { return float_of(uint32_t{x.bits} << 16); }
NABLA_FAST_DEVICE float to_float(float16 x) {
#if defined(__CUDACC__)
  float wide;
  asm("cvt.f32.f16 %0, %1;" : "=f"(wide) : "h"(x.bits));
  return wide;
#else
  // The exponent of a float32 is larger by 112 (by 224 for infinities and NaN); a product with 2^-24
  // takes subnormal numbers as they are.
  const uint32_t sign = uint32_t{x.bits & 0x8000u} << 16, rest = x.bits & 0x7FFFu;
  if (rest < 0x0400) return float_of(sign | bits_of(static_cast<float>(rest) * 0x1p-24f));
  return float_of(sign | ((rest << 13) + ((rest < 0x7C00 ? 112u : 224u) << 23)));
#endif
}

// Two elements side by side, the first in the lower half. `from` is a multiple of their size.
template <typename T>
NABLA_FAST_DEVICE uint32_t load_pair(const T* from) {
  static_assert(sizeof(T) == 2);
#if defined(__CUDACC__)
  return *reinterpret_cast<const uint32_t*>(from);
#else
  host::expect_aligned(from, sizeof(uint32_t));
  uint32_t pair;
  std::memcpy(&pair, from, sizeof pair);
  return pair;
#endif
}

#if !defined(__CUDACC__)
// The sum over k of the products that one element of mma_16x8x16() has: with row `row` of a and column
// `column` of b, where lanes 4 n to 4 n + 3 hold row n and column n.
template <typename T>
float product_of_pairs(const uint64_t (&a)[4], const uint64_t (&b)[4]) {
  double sum = 0;
  for (int lane = 0; lane < 4; ++lane)
    for (int part = 0; part < 4; ++part)
      sum += double{to_float(T{static_cast<uint16_t>(a[lane] >> 16 * part)})} *
             to_float(T{static_cast<uint16_t>(b[lane] >> 16 * part)});
  return static_cast<float>(sum);
}
#endif

// c += a b of a warp's matrix unit, [16, 8] += [16, 16] [16, 8]. With g = lane / 4 and t = lane % 4 a lane
// holds, as pairs along k, a[0], a[2]: row g, k = 2 t and 2 t + 8; a[1], a[3]: row g + 8, the same; b[0],
// b[1]: column g, the same; and of c rows g (c[0], c[1]) and g + 8 (c[2], c[3]), columns 2 t and 2 t + 1.
// How a unit rounds its sums is the device's matter; sums of few products are for it.
template <typename T>
NABLA_FAST_DEVICE void mma_16x8x16(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
#if defined(__CUDACC__)
  if constexpr (std::is_same_v<T, bfloat16>)
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
        "{%8, %9}, {%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
  else
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
        "{%8, %9}, {%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
#else
  const unsigned lane = threadIdx.x % kWarpThreads, group = lane / 4, place = lane % 4;
  const uint64_t upper = a[0] | uint64_t{a[2]} << 32, lower = a[1] | uint64_t{a[3]} << 32;
  const uint64_t column = b[0] | uint64_t{b[1]} << 32;
  uint64_t row[2][4], columns[2][4];
  for (unsigned n = 0; n < 4; ++n) {
    row[0][n] = host::exchange(4 * group + n, upper);
    row[1][n] = host::exchange(4 * group + n, lower);
    for (unsigned k = 0; k < 2; ++k)
      columns[k][n] = host::exchange(4 * (2 * place + k) + n, column);
  }
  for (int half = 0; half < 2; ++half)
    for (int k = 0; k < 2; ++k) c[2 * half + k] += product_of_pairs<T>(row[half], columns[k]);
#endif
}

// A float32 rounded to nearest, ties to even.
template <typename T>
NABLA_FAST_DEVICE T rounded(float x);

template <>
NABLA_FAST_DEVICE float rounded<float>(float x) {
  return x;
}

template <>
NABLA_FAST_DEVICE bfloat16 rounded<bfloat16>(float x) {
#if defined(__CUDACC__)
  bfloat16 result;
  asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(result.bits) : "f"(x));
  return result;
#else
  const uint32_t bits = bits_of(x);
  if (x != x) return {0x7FFF};
  return {static_cast<uint16_t>((bits + 0x7FFF + (bits >> 16 & 1)) >> 16)};
#endif
}

template <>
NABLA_FAST_DEVICE float16 rounded<float16>(float x) {
#if defined(__CUDACC__)
  float16 result;
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(result.bits) : "f"(x));
  return result;
#else
  const uint32_t bits = bits_of(x), sign = bits >> 16 & 0x8000, rest = bits & 0x7FFFFFFF;
  if (x != x) return {0x7FFF};
  if (rest >= 0x477FF000) return {static_cast<uint16_t>(sign | 0x7C00)};  // 65520 and more
  // Where float16 is subnormal, adding 2^-1 leaves its digits at the end of the sum.
  if (rest < 0x38800000)
    return {static_cast<uint16_t>(sign | (bits_of(float_of(rest) + 0.5f) - 0x3F000000))};
  return {static_cast<uint16_t>(sign | ((rest - 0x38000000 + 0xFFF + (rest >> 13 & 1)) >> 13))};
#endif
}

// -- four elements at once ------------------------------------------------------------------------

template <typename T>
struct alignas(4 * sizeof(T)) Four {
  T of[4];
};

// `from` and `to` are multiples of the size of four elements.
template <typename T>
NABLA_FAST_DEVICE Four<T> load_four(const T* from) {
#if defined(__CUDACC__)
  return *reinterpret_cast<const Four<T>*>(from);
#else
  host::expect_aligned(from, sizeof(Four<T>));
  Four<T> four;
  std::memcpy(&four, from, sizeof four);
  return four;
#endif
}

template <typename T>
NABLA_FAST_DEVICE void store_four(T* to, const Four<T>& four) {
#if defined(__CUDACC__)
  *reinterpret_cast<Four<T>*>(to) = four;
#else
  host::expect_aligned(to, sizeof(Four<T>));
  std::memcpy(to, &four, sizeof four);
#endif
}

// As many elements as 16 bytes hold, side by side in words, the first in the lower half of one.
template <typename T>
constexpr int kWide = 16 / sizeof(T);
template <typename T>
struct alignas(16) Wide {
  uint32_t words[4];
};

// `from` is a multiple of 16.
template <typename T>
NABLA_FAST_DEVICE Wide<T> load_wide(const T* from) {
#if defined(__CUDACC__)
  return *reinterpret_cast<const Wide<T>*>(from);
#else
  host::expect_aligned(from, sizeof(Wide<T>));
  Wide<T> wide;
  std::memcpy(&wide, from, sizeof wide);
  return wide;
#endif
}

NABLA_FAST_DEVICE void to_floats(const Wide<float>& wide, float (&floats)[kWide<float>]) {
  NABLA_FAST_UNROLL
  for (int n = 0; n < 4; ++n) floats[n] = float_of(wide.words[n]);
}
NABLA_FAST_DEVICE void to_floats(const Wide<bfloat16>& wide, float (&floats)[kWide<bfloat16>]) {
  NABLA_FAST_UNROLL
  for (int n = 0; n < 4; ++n) {
    floats[2 * n] = float_of(wide.words[n] << 16);
    floats[2 * n + 1] = float_of(wide.words[n] & 0xFFFF0000u);
  }
}
NABLA_FAST_DEVICE void to_floats(const Wide<float16>& wide, float (&floats)[kWide<float16>]) {
  NABLA_FAST_UNROLL
  for (int n = 0; n < 4; ++n) {
#if defined(__CUDACC__)
    asm("{\n\t.reg .b16 low, high;\n\tmov.b32 {low, high}, %2;\n\tcvt.f32.f16 %0, low;\n\t"
        "cvt.f32.f16 %1, high;\n\t}"
        : "=f"(floats[2 * n]), "=f"(floats[2 * n + 1])
        : "r"(wide.words[n]));
#else
    floats[2 * n] = to_float(float16{static_cast<uint16_t>(wide.words[n])});
    floats[2 * n + 1] = to_float(float16{static_cast<uint16_t>(wide.words[n] >> 16)});
#endif
  }
}

}  // namespace nabla_fast::cuda

#endif  // NABLA_FAST_CUDA_DEVICE_H_
