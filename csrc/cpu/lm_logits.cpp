// nabla_fast_lm_logits: hidden states times a head, for few rows: the head is read once, at the
// rate of memory, and never widened as a whole.
//
// An inner product is summed in 16 lanes over H, and the lanes in a tree: in one order, whatever
// the number of rows or threads.

#include <algorithm>
#include <cstdint>
#include <cstring>

#ifdef _OPENMP
  #include <omp.h>
#endif

#include "isa.h"
#include "nabla_fast.h"

namespace nabla_fast::cpu {
namespace {

constexpr int kLanes = 16;
// Tokens and rows whose inner products are held in registers at once.
constexpr int kTokens = 4;
constexpr int kRows = 4;
// How far ahead weights are fetched, in whole tiles: the hardware's own prefetching leaves memory
// idle during the arithmetic.
constexpr int64_t kBytesAhead = 8192;
// Of them, blocks that stay in a cache.
constexpr int64_t kTokenBlock = 64;
constexpr int64_t kRowBlock = 16;
// Tokens between which threads may be split.
constexpr int64_t kChunk = 512;
// Less work than this is not worth waking a thread for.
constexpr int64_t kProductsPerThread = 1 << 18;

typedef float Lanes __attribute__((vector_size(4 * kLanes)));
typedef uint32_t Words __attribute__((vector_size(4 * kLanes)));
typedef uint16_t Halves __attribute__((vector_size(2 * kLanes)));

NABLA_FAST_INLINE Lanes load(const float* x) {
  Lanes lanes;
  std::memcpy(&lanes, x, sizeof lanes);
  return lanes;
}

NABLA_FAST_INLINE Lanes load(const uint16_t* x) {
  Halves halves;
  std::memcpy(&halves, x, sizeof halves);
  Words words = __builtin_convertvector(halves, Words) << 16;
  Lanes lanes;
  std::memcpy(&lanes, &words, sizeof lanes);
  return lanes;
}

// The first `count` elements, and zeros.
template <typename T>
NABLA_FAST_INLINE Lanes load_part(const T* x, int count) {
  T padded[kLanes] = {};
  std::memcpy(padded, x, sizeof(T) * static_cast<size_t>(count));
  return load(padded);
}

// Halves of two vectors added crosswise: four rounds of it take 16 vectors to the vector of their
// lanes' sums.
NABLA_FAST_INLINE Lanes fold8(Lanes a, Lanes b) {
  return __builtin_shufflevector(a, b, 0, 1, 2, 3, 4, 5, 6, 7, 16, 17, 18, 19, 20, 21, 22, 23) +
         __builtin_shufflevector(a, b, 8, 9, 10, 11, 12, 13, 14, 15, 24, 25, 26, 27, 28, 29, 30,
                                 31);
}

NABLA_FAST_INLINE Lanes fold4(Lanes a, Lanes b) {
  return __builtin_shufflevector(a, b, 0, 1, 2, 3, 8, 9, 10, 11, 16, 17, 18, 19, 24, 25, 26, 27) +
         __builtin_shufflevector(a, b, 4, 5, 6, 7, 12, 13, 14, 15, 20, 21, 22, 23, 28, 29, 30, 31);
}

NABLA_FAST_INLINE Lanes fold2(Lanes a, Lanes b) {
  return __builtin_shufflevector(a, b, 0, 1, 4, 5, 8, 9, 12, 13, 16, 17, 20, 21, 24, 25, 28, 29) +
         __builtin_shufflevector(a, b, 2, 3, 6, 7, 10, 11, 14, 15, 18, 19, 22, 23, 26, 27, 30, 31);
}

NABLA_FAST_INLINE Lanes fold1(Lanes a, Lanes b) {
  return __builtin_shufflevector(a, b, 0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30) +
         __builtin_shufflevector(a, b, 1, 3, 5, 7, 9, 11, 13, 15, 17, 19, 21, 23, 25, 27, 29, 31);
}

// The sums of 16 vectors' lanes, in order.
NABLA_FAST_INLINE Lanes sums(const Lanes (&x)[kRows * kTokens]) {
  Lanes a[8], b[4];
#pragma GCC unroll 8
  for (int n = 0; n < 8; ++n) a[n] = fold8(x[2 * n], x[2 * n + 1]);
#pragma GCC unroll 4
  for (int n = 0; n < 4; ++n) b[n] = fold4(a[2 * n], a[2 * n + 1]);
  return fold1(fold2(b[0], b[1]), fold2(b[2], b[3]));
}

struct Product {
  const float* hidden;
  int64_t rows, hidden_stride;
  const void* head;
  int64_t vocab, width, head_stride;
  float* logits;
  int64_t logits_stride;
};

// Inner products of `R` rows with four tokens; `tokens` of them are stored.
template <int R, bool kPrefetch, typename T>
NABLA_FAST_INLINE void tile(const Product& p, int64_t row, int64_t token, int tokens) {
  const T* w[kTokens];
#pragma GCC unroll 4
  for (int t = 0; t < kTokens; ++t)
    w[t] = static_cast<const T*>(p.head) + (token + std::min(t, tokens - 1)) * p.head_stride;
  const float* h[R];
#pragma GCC unroll 4
  for (int r = 0; r < R; ++r) h[r] = p.hidden + (row + r) * p.hidden_stride;
  Lanes total[kRows * kTokens] = {};
  // An address, not an access: behind the head's end it does nothing.
  int64_t tile_bytes = kTokens * static_cast<int64_t>(sizeof(T)) * p.width;
  int64_t ahead = (kBytesAhead / (tile_bytes + 1) + 1) * kTokens * p.head_stride;
  int64_t whole = p.width - p.width % kLanes;
  for (int64_t k = 0; k < whole; k += kLanes) {
    Lanes weights[kTokens];
#pragma GCC unroll 4
    for (int t = 0; t < kTokens; ++t) {
      weights[t] = load(w[t] + k);
      if (kPrefetch) __builtin_prefetch(w[t] + k + ahead);
    }
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) {
      Lanes state = load(h[r] + k);
#pragma GCC unroll 4
      for (int t = 0; t < kTokens; ++t) total[r * kTokens + t] += state * weights[t];
    }
  }
  if (int rest = static_cast<int>(p.width - whole)) {
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) {
      Lanes state = load_part(h[r] + whole, rest);
#pragma GCC unroll 4
      for (int t = 0; t < kTokens; ++t)
        total[r * kTokens + t] += state * load_part(w[t] + whole, rest);
    }
  }
  float result[kLanes];
  Lanes summed = sums(total);
  std::memcpy(result, &summed, sizeof result);
#pragma GCC unroll 4
  for (int r = 0; r < R; ++r)
    std::memcpy(p.logits + (row + r) * p.logits_stride + token, result + r * kTokens,
                sizeof(float) * static_cast<size_t>(tokens));
}

// Rows [first, last) with four tokens.
template <bool kPrefetch, typename T>
NABLA_FAST_INLINE void column(const Product& p, int64_t first, int64_t last, int64_t token,
                              int tokens) {
  int64_t row = first;
  if (kPrefetch && last - first >= kRows) {
    tile<kRows, true, T>(p, row, token, tokens);
    row += kRows;
  }
  for (; row + kRows <= last; row += kRows) tile<kRows, false, T>(p, row, token, tokens);
  if (last - row == 3) tile<3, kPrefetch, T>(p, row, token, tokens);
  if (last - row == 2) tile<2, kPrefetch, T>(p, row, token, tokens);
  if (last - row == 1) tile<1, kPrefetch, T>(p, row, token, tokens);
}

// All rows with tokens [first, last): a block of tokens stays in the second-level cache while
// blocks of rows, which stay in the first, pass over it.
template <typename T>
NABLA_FAST_INLINE void chunk(const Product& p, int64_t first, int64_t last) {
  for (int64_t block = first; block < last; block += kTokenBlock) {
    int64_t end = std::min(last, block + kTokenBlock);
    for (int64_t row = 0; row < p.rows; row += kRowBlock) {
      int64_t rows_end = std::min(p.rows, row + kRowBlock);
      for (int64_t token = block; token < end; token += kTokens) {
        int tokens = static_cast<int>(std::min<int64_t>(kTokens, end - token));
        if (row == 0)
          column<true, T>(p, row, rows_end, token, tokens);
        else
          column<false, T>(p, row, rows_end, token, tokens);
      }
    }
  }
}

void chunk_baseline_f32(const Product& p, int64_t a, int64_t b) { chunk<float>(p, a, b); }
NABLA_FAST_TARGET_AVX2 void chunk_avx2_f32(const Product& p, int64_t a, int64_t b) {
  chunk<float>(p, a, b);
}
NABLA_FAST_TARGET_AVX512 void chunk_avx512_f32(const Product& p, int64_t a, int64_t b) {
  chunk<float>(p, a, b);
}
void chunk_baseline_bf16(const Product& p, int64_t a, int64_t b) { chunk<uint16_t>(p, a, b); }
NABLA_FAST_TARGET_AVX2 void chunk_avx2_bf16(const Product& p, int64_t a, int64_t b) {
  chunk<uint16_t>(p, a, b);
}
NABLA_FAST_TARGET_AVX512 void chunk_avx512_bf16(const Product& p, int64_t a, int64_t b) {
  chunk<uint16_t>(p, a, b);
}

}  // namespace
}  // namespace nabla_fast::cpu

extern "C" nabla_fast_status nabla_fast_lm_logits(const float* hidden, int64_t rows,
                                                  int64_t hidden_stride, const void* head,
                                                  nabla_fast_dtype head_dtype, int64_t vocab,
                                                  int64_t width, int64_t head_stride, float* logits,
                                                  int64_t logits_stride, int32_t num_threads) {
  using namespace nabla_fast::cpu;
  if (rows < 0 || vocab < 0 || width < 0) return NABLA_FAST_INVALID_SHAPE;
  if (head_dtype != NABLA_FAST_FLOAT32 && head_dtype != NABLA_FAST_BFLOAT16)
    return NABLA_FAST_UNKNOWN_DTYPE;
  if (rows == 0 || vocab == 0) return NABLA_FAST_OK;
  if (!logits || (width > 0 && (!hidden || !head))) return NABLA_FAST_INVALID_POINTER;
  Product product{hidden, rows,        hidden_stride, head,         vocab,
                  width,  head_stride, logits,        logits_stride};
  auto* run = head_dtype == NABLA_FAST_FLOAT32
                  ? select_isa(chunk_baseline_f32, chunk_avx2_f32, chunk_avx512_f32)
                  : select_isa(chunk_baseline_bf16, chunk_avx2_bf16, chunk_avx512_bf16);
  int64_t chunks = (vocab + kChunk - 1) / kChunk;
#ifdef _OPENMP
  int threads = num_threads > 0 ? num_threads : omp_get_max_threads();
  // Reading the head costs what some rows of arithmetic cost.
  int64_t work = vocab * width * (rows + 4);
  threads = static_cast<int>(
      std::max<int64_t>(1, std::min<int64_t>({threads, chunks, work / kProductsPerThread})));
  #pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1)
#else
  (void)num_threads;
#endif
  for (int64_t n = 0; n < chunks; ++n) {
    run(product, n * kChunk, std::min(vocab, (n + 1) * kChunk));
  }
  return NABLA_FAST_OK;
}
