#include "hard_token.h"

#include <algorithm>
#include <cmath>

#include "gumbel.h"
#include "isa.h"
#include "threads.h"
#include "vec.h"
#include "widen.h"

namespace nabla_fast::cpu {
namespace {

// Tokens that are looked at together, and those that a thread takes.
constexpr int kChunk = 1024;
constexpr int64_t kPart = 16 * kChunk;
constexpr int64_t kTokensPerThread = int64_t{1} << 16;

constexpr float kMaxFloat = std::numeric_limits<float>::max();
constexpr float kInfinity = std::numeric_limits<float>::infinity();

// The largest of n numbers, n a multiple of 16, and whether one is NaN or +inf.
template <int W>
NABLA_FAST_INLINE float largest(const float* y, int n, bool& unclean) {
  Floats<W> top[4] = {splat<W>(-kInfinity), splat<W>(-kInfinity), splat<W>(-kInfinity),
                      splat<W>(-kInfinity)};
  Ints<W> bad = {};
  const int whole = n / (4 * W) * (4 * W);
  for (int i = 0; i < whole; i += 4 * W) {
#pragma GCC unroll 4
    for (int part = 0; part < 4; ++part) {
      const Floats<W> x = load<W>(y + i + part * W);
      top[part] = x > top[part] ? x : top[part];
      bad |= ~(x <= kMaxFloat);
    }
  }
  for (int i = whole; i < n; i += W) {
    const Floats<W> x = load<W>(y + i);
    top[0] = x > top[0] ? x : top[0];
    bad |= ~(x <= kMaxFloat);
  }
  unclean = any_lane<W>(bad);
  top[0] = top[0] > top[1] ? top[0] : top[1];
  top[2] = top[2] > top[3] ? top[2] : top[3];
  return lane_max<W>(top[0] > top[2] ? top[0] : top[2]);
}

template <int W, typename T>
NABLA_FAST_INLINE Top find_top(const T* logits, int64_t seed, int64_t position, bool noise,
                               int64_t begin, int64_t end) {
  alignas(64) float y[kChunk], g[kChunk];
  Top top;
  for (int64_t first = begin; first < end; first += kChunk) {
    const int n = static_cast<int>(std::min<int64_t>(kChunk, end - first));
    const float* from = y;
    if constexpr (sizeof(T) == 4) {
      if (!noise && n == kChunk) from = logits + first;
    }
    if (from == y) {
      const int padded_n = static_cast<int>(padded(n));
      widen<W>(logits + first, n, y);
      if (noise) {
        gumbel_noise<W / 2>(seed, position, first, n, g);
        for (int i = 0; i < n; ++i) y[i] += g[i];
      }
      for (int i = n; i < padded_n; ++i) y[i] = -kInfinity;
    }
    bool unclean = false;
    const float max = largest<W>(from, static_cast<int>(padded(n)), unclean);
    if (unclean) {
      const bool nan = std::any_of(from, from + n, [](float x) { return std::isnan(x); });
      Top bad;
      bad.status = nan ? NABLA_FAST_ROW_NAN : NABLA_FAST_ROW_INFINITE;
      top.join(bad);
    }
    if (max > top.max) {
      top.max = max;
      top.token = first + (std::find(from, from + n, max) - from);
    }
  }
  return top;
}

template <int W>
NABLA_FAST_INLINE Top find_top(const Table& logits, int64_t row, const NoiseKeys& keys,
                               int64_t begin, int64_t end) {
  const bool noise = keys.seed != nullptr;
  const int64_t seed = noise ? keys.seed[row] : 0, position = noise ? keys.position[row] : 0;
  if (logits.dtype == NABLA_FAST_FLOAT32)
    return find_top<W>(static_cast<const float*>(logits.data) + row * logits.stride, seed, position,
                       noise, begin, end);
  return find_top<W>(static_cast<const uint16_t*>(logits.data) + row * logits.stride, seed,
                     position, noise, begin, end);
}

Top top_baseline(const Table& z, int64_t row, const NoiseKeys& keys, int64_t begin, int64_t end) {
  return find_top<4>(z, row, keys, begin, end);
}
NABLA_FAST_TARGET_AVX2 Top top_avx2(const Table& z, int64_t row, const NoiseKeys& keys,
                                    int64_t begin, int64_t end) {
  return find_top<8>(z, row, keys, begin, end);
}
NABLA_FAST_TARGET_AVX512 Top top_avx512(const Table& z, int64_t row, const NoiseKeys& keys,
                                        int64_t begin, int64_t end) {
  return find_top<16>(z, row, keys, begin, end);
}

}  // namespace

Top top_of(const Table& logits, int64_t row, const NoiseKeys& keys, int64_t begin, int64_t end) {
  return select_isa(top_baseline, top_avx2, top_avx512)(logits, row, keys, begin, end);
}

int64_t top_parts(int64_t rows, int64_t vocab) { return rows * ((vocab + kPart - 1) / kPart); }

void tops_of_rows(const Table& logits, int64_t rows, int64_t vocab, const NoiseKeys& keys,
                  int32_t num_threads, Top* parts, Top* tops) {
  const int64_t parts_of_row = top_parts(1, vocab), count = rows * parts_of_row;
  const int threads = threads_for(count * kPart, kTokensPerThread, num_threads);
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1)
  for (int64_t n = 0; n < count; ++n) {
    const int64_t begin = n % parts_of_row * kPart;
    parts[n] = top_of(logits, n / parts_of_row, keys, begin, std::min(vocab, begin + kPart));
  }
  for (int64_t row = 0; row < rows; ++row) {
    tops[row] = Top{};
    for (int64_t part = 0; part < parts_of_row; ++part)
      tops[row].join(parts[row * parts_of_row + part]);
  }
}

}  // namespace nabla_fast::cpu
