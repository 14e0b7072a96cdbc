#include "softmax/relaxed_tiles.h"

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>

#include "base/floats.h"
#include "base/isa.h"
#include "simd/bf16.h"
#include "simd/gumbel.h"
#include "simd/vec.h"
#include "softmax/row_softmax.h"

namespace nabla_fast::softmax {
namespace {

// -- rows in memory -------------------------------------------------------------------------------

// Rows lie far apart: the part of each that a later tile reads is prefetched.
constexpr int64_t kPrefetchTokens = 256;

template <int W>
NABLA_FAST_INLINE void load_block(const gemm::Table& from, int64_t row, int64_t column, int columns,
                                  Floats<W>& x) {
  const int64_t at = row * from.stride + column;
  __builtin_prefetch(static_cast<const char*>(from.data) + (at + kPrefetchTokens) * from.bytes(), 0,
                     2);
  if (columns < W) {
    float part[16];
    gemm::copy_to_fp32<W>(from, row, column, columns, part);
    x = load<W>(part);
  } else if (from.dtype == NABLA_FAST_FLOAT32) {
    x = load<W>(static_cast<const float*>(from.data) + at);
  } else {
    x = load_fp32<W>(static_cast<const uint16_t*>(from.data) + at);
  }
}

template <int W>
NABLA_FAST_INLINE void load_rows_kernel(const gemm::Table& from, int rows, int64_t token,
                                        int tokens, float* tile) {
  const int lanes = gemm::lanes_of(rows);
  for (int t = 0; t < tokens; t += W) {
    const int some = std::min(W, tokens - t);
    for (int r = 0; r < lanes; r += W) {
      Floats<W> x[W] = {};
      for (int n = 0; n < W && r + n < rows; ++n) load_block<W>(from, r + n, token + t, some, x[n]);
      transpose<W>(x);
      for (int n = 0; n < some; ++n) store<W>(tile + (t + n) * lanes + r, x[n]);
    }
  }
}

template <int W>
NABLA_FAST_INLINE void store_rows_kernel(const float* tile, int rows, int64_t token, int tokens,
                                         void* to, nabla_fast_dtype dtype, int64_t stride) {
  const int lanes = gemm::lanes_of(rows);
  const int64_t bytes = dtype == NABLA_FAST_FLOAT32 ? 4 : 2;
  for (int t = 0; t < tokens; t += W) {
    const int some = std::min(W, tokens - t);
    for (int r = 0; r < rows; r += W) {
      Floats<W> x[W] = {};
      for (int n = 0; n < some; ++n) x[n] = load<W>(tile + (t + n) * lanes + r);
      transpose<W>(x);
      for (int n = 0; n < W && r + n < rows; ++n) {
        const int64_t at = (r + n) * stride + token + t;
        __builtin_prefetch(static_cast<const char*>(to) + (at + kPrefetchTokens) * bytes, 1, 2);
        if (dtype == NABLA_FAST_FLOAT32) {
          float* out = static_cast<float*>(to) + at;
          if (some == W)
            store<W>(out, x[n]);
          else
            for (int lane = 0; lane < some; ++lane) out[lane] = x[n][lane];
        } else {
          auto* out = static_cast<uint16_t*>(to) + at;
          for (int lane = 0; lane < some; ++lane) out[lane] = fp32_to_bf16(x[n][lane]);
        }
      }
    }
  }
}

template <int W>
NABLA_FAST_INLINE void noise_rows_kernel(const NoiseKeys& keys, int rows, int64_t token, int tokens,
                                         float* tile) {
  alignas(64) float noise[W][gemm::kVocabTileTokens];
  const int lanes = gemm::lanes_of(rows);
  for (int r = 0; r < rows; r += W) {
    const int some = std::min(W, rows - r);
    for (int n = 0; n < some; ++n)
      gumbel_noise<W / 2>(keys.seed[r + n], keys.position[r + n], token, gemm::kVocabTileTokens,
                          noise[n]);
    for (int t = 0; t < tokens; t += W) {
      Floats<W> x[W] = {};
      for (int n = 0; n < some; ++n) x[n] = load<W>(noise[n] + t);
      transpose<W>(x);
      for (int n = 0; n < std::min(W, tokens - t); ++n) {
        float* out = tile + (t + n) * lanes + r;
        store<W>(out, load<W>(out) + x[n]);
      }
    }
  }
}

// -- rows in lanes --------------------------------------------------------------------------------

// Largest y of the tile, the first token that has it, and whether one is NaN: [lanes] each.
template <int W>
NABLA_FAST_INLINE void find_tops_kernel(const float* y, int lanes, int tokens, float* max,
                                        int32_t* token, int32_t* nan) {
  for (int lane = 0; lane < lanes; lane += W) {
    Floats<W> top = splat<W>(-kInfinity);
    Ints<W> at = {}, unordered = {}, now = {};
    for (int t = 0; t < tokens; ++t) {
      const Floats<W> value = load<W>(y + t * lanes + lane);
      const Ints<W> higher = value > top;
      top = higher ? value : top;
      at = higher ? now : at;
      unordered |= value != value;
      now += 1;
    }
    store<W>(max + lane, top);
    std::memcpy(token + lane, &at, sizeof at);
    std::memcpy(nan + lane, &unordered, sizeof unordered);
  }
}

template <int W, bool kBf16>
NABLA_FAST_INLINE void exp_and_sum_lanes_kernel(float* y, int lanes, int tokens, const float* max,
                                                float inverse, float* sum_e) {
  for (int lane = 0; lane < lanes; lane += W) {
    const Floats<W> top = load<W>(max + lane);
    Floats<W> sum = {};
    for (int t = 0; t < tokens; ++t) {
      float* at = y + t * lanes + lane;
      Floats<W> e = vec_exp_or_zero<W>((load<W>(at) - top) * inverse);
      if constexpr (kBf16) e = rounded_to_bf16<W>(e);
      store<W>(at, e);
      sum += e;
    }
    store<W>(sum_e + lane, sum);
  }
}

// -- for each instruction set ---------------------------------------------------------------------

NABLA_FAST_FOR_EACH_ISA(load_rows, load_rows_kernel<W>)
NABLA_FAST_FOR_EACH_ISA(store_rows, store_rows_kernel<W>)
NABLA_FAST_FOR_EACH_ISA(add_noise_rows, noise_rows_kernel<W>)
NABLA_FAST_FOR_EACH_ISA(find_tops, find_tops_kernel<W>)
NABLA_FAST_FOR_EACH_ISA(exp_and_sum_lanes, exp_and_sum_lanes_kernel<W, false>)
NABLA_FAST_FOR_EACH_ISA(exp_and_sum_lanes_bf16, exp_and_sum_lanes_kernel<W, true>)

}  // namespace

void load_tile(const gemm::Table& from, int rows, int64_t token, int tokens, float* tile) {
  load_rows(from, rows, token, tokens, tile);
}

void store_tile(const float* tile, int rows, int64_t token, int tokens, void* to,
                nabla_fast_dtype dtype, int64_t stride) {
  store_rows(tile, rows, token, tokens, to, dtype, stride);
}

void add_noise(const NoiseKeys& keys, int rows, int64_t token, int tokens, float* tile) {
  add_noise_rows(keys, rows, token, tokens, tile);
}

void add_tile(const float* other, int rows, int tokens, float* tile) {
  for (int n = 0; n < tokens * gemm::lanes_of(rows); ++n) tile[n] += other[n];
}

bool update_max(const float* y, int rows, int64_t token, int tokens, double tau, Tops& tops,
                float* factor) {
  alignas(64) float max[gemm::kRowsPerGroup];
  int32_t at[gemm::kRowsPerGroup], nan[gemm::kRowsPerGroup];
  find_tops(y, gemm::lanes_of(rows), tokens, max, at, nan);
  bool moved = false;
  for (int r = 0; r < rows; ++r) {
    tops.nan[r] |= nan[r];
    factor[r] = 1;
    if (!(max[r] > tops.max[r])) continue;
    factor[r] = static_cast<float>(rescale(tops.max[r], max[r], tau));
    tops.max[r] = max[r];
    tops.token[r] = token + at[r];
    moved = true;
  }
  return moved;
}

void exp_and_sum(float* y, int rows, int tokens, const float* max, double tau, bool bf16,
                 Sums& sums) {
  alignas(64) float e[gemm::kRowsPerGroup];
  const auto& run = bf16 ? exp_and_sum_lanes_bf16 : exp_and_sum_lanes;
  run(y, gemm::lanes_of(rows), tokens, max, static_cast<float>(1 / tau), e);
  for (int r = 0; r < rows; ++r) sums.e[r] += e[r];
}

}  // namespace nabla_fast::softmax
