// Tiles [tokens, lanes], a row of a group in each lane: of perturbed logits y = z + noise, of
// gradients G with respect to the relaxed one-hot, and of direct gradients.
#ifndef NABLA_FAST_CPU_SOFTMAX_RELAXED_TILES_H_
#define NABLA_FAST_CPU_SOFTMAX_RELAXED_TILES_H_

#include <cstdint>

#include "base/floats.h"
#include "gemm/vocab_tiles.h"
#include "nabla_fast.h"
#include "softmax/row_status.h"

namespace nabla_fast::softmax {

// Floats of a whole tile.
constexpr int kTileFloats = gemm::kVocabTileTokens * gemm::kRowsPerGroup;

// Keys of a call's noise, from a group's first row on; null where there is none.
struct NoiseKeys {
  const int64_t* seed;
  const int64_t* position;
};

// Largest y of a group's rows so far.
struct Tops {
  alignas(64) float max[gemm::kRowsPerGroup];      // of y
  alignas(64) int64_t token[gemm::kRowsPerGroup];  // the first with that y; -1 while all are masked
  alignas(64) int32_t nan[gemm::kRowsPerGroup];    // other than 0 if a y is NaN

  void clear() {
    for (int r = 0; r < gemm::kRowsPerGroup; ++r) {
      max[r] = -kInfinity;
      token[r] = -1;
      nan[r] = 0;
    }
  }

  // Of rows whose tokens are all here.
  nabla_fast_status status(int row) const { return row_status(max[row], nan[row] != 0); }
};

// Sums over a group's tokens, e = exp((y - max) / tau) and c a constant of each row.
struct Sums {
  double e[gemm::kRowsPerGroup];                  // sum of e
  double weighted_grad_sum[gemm::kRowsPerGroup];  // sum of e (G - c)

  void clear() {
    for (int r = 0; r < gemm::kRowsPerGroup; ++r) e[r] = weighted_grad_sum[r] = 0;
  }
};

// tile = rows [0, rows) of `from` at columns [token, token + tokens); 0 behind the last row.
void load_tile(const gemm::Table& from, int rows, int64_t token, int tokens, float* tile);

// `to` likewise = tile: [rows, ..] of `dtype`, `stride` elements apart.
void store_tile(const float* tile, int rows, int64_t token, int tokens, void* to,
                nabla_fast_dtype dtype, int64_t stride);

// tile += noise; token: a multiple of 4.
void add_noise(const NoiseKeys& keys, int rows, int64_t token, int tokens, float* tile);

// tile += other
void add_tile(const float* other, int rows, int tokens, float* tile);

// Adds the y of tokens [token, token + tokens) to `tops`. Returns whether a maximum moved; then
// factor[r] = exp((old - new) / tau), 1 where it did not move.
bool update_max(const float* y, int rows, int64_t token, int tokens, double tau, Tops& tops,
                float* factor);

// y = e, rounded to bf16 if `bf16` is true, added to sums.e.
void exp_and_sum(float* y, int rows, int tokens, const float* max, double tau, bool bf16,
                 Sums& sums);

// y = e; grad = G - c, and 0 where e is: G may be infinite there. Adds to `sums`.
void weighted_grad_sum(float* y, float* grad, int rows, int tokens, const float* max,
                       const float* centre, double tau, Sums& sums);

// grad = e (grad - mean) weight, with e of the tile's y and grad = G - c; 0 where e is.
void softmax_jacobian(const float* y, float* grad, int rows, int tokens, const float* max,
                      const float* mean, const float* weight, double tau);

}  // namespace nabla_fast::softmax

#endif  // NABLA_FAST_CPU_SOFTMAX_RELAXED_TILES_H_
