// A tile of the head at a time: logits of all rows, their exponentials, and both sums over the
// tile's rows while these are still in a cache. Rows lie side by side in vectors.

#include "ops/dto_descent_latents_pass.h"

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>

#include "base/floats.h"
#include "base/isa.h"
#include "gemm/amx.h"
#include "gemm/vocab_tiles.h"
#include "gemm/weighted_sums.h"
#include "simd/gumbel.h"
#include "simd/vec.h"
#include "softmax/head_map.h"

namespace nabla_fast::descent {
namespace {

// Exponentials are multiplied by 2^kExpPower, so that the smallest ones that a float32 softmax has,
// and what they are multiplied by, are no numbers below 2^-126: these have fewer digits, and
// arithmetic with them is many times slower.
constexpr int kExpPower = 24;
// exp of anything lower counts as 0.
constexpr float kMinScaledExponent = -103.9f;

// Arrays of a tile: [tokens, lanes], the noise [rows, tokens].
struct Tile {
  alignas(64) float y[gemm::kVocabTileTokens * kRowsPerHeadPass];
  alignas(64) float grad[gemm::kVocabTileTokens * kRowsPerHeadPass];
  alignas(64) float slope[gemm::kVocabTileTokens * kRowsPerHeadPass];  // dz/du, where it is not 1
  alignas(64) float noise[kRowsPerHeadPass * gemm::kVocabTileTokens];
  // Weights e and e (G - c) side by side; vectors are stored past the last of them.
  alignas(64) float weights[(gemm::kVocabTileTokens + 1) * gemm::kRowsPerGroup];
  alignas(64) float top[kRowsPerHeadPass];  // largest y of the tile
  alignas(64) float max[kRowsPerHeadPass];  // of the segment so far
  alignas(64) float centre[kRowsPerHeadPass];
  alignas(64) float sum[kRowsPerHeadPass];
  alignas(64) float weighted_grad_sum[kRowsPerHeadPass];
};

// out[t * lanes + r] = from[r][t], or += it.
template <int W, bool kAdd>
NABLA_FAST_INLINE void transpose_tile(const float* const (&from)[kRowsPerHeadPass], int rows,
                                      int lanes, int tokens, float* out) {
  for (int r = 0; r < rows; r += W) {
    for (int t = 0; t < tokens; t += W) {
      const int some = std::min(W, tokens - t);
      Floats<W> x[W];
      for (int i = 0; i < W; ++i) {
        x[i] = Floats<W>{};
        if (r + i >= rows) continue;
        if (some == W)
          x[i] = load<W>(from[r + i] + t);
        else
          std::memcpy(&x[i], from[r + i] + t, sizeof(float) * static_cast<size_t>(some));
      }
      transpose<W>(x);
      for (int i = 0; i < some; ++i) {
        float* const to = out + (t + i) * lanes + r;
        store<W>(to, kAdd ? load<W>(to) + x[i] : x[i]);
      }
    }
  }
}

template <int W>
NABLA_FAST_INLINE void add_noise(const HeadPass& pass, int64_t token, int tokens, Tile& tile) {
  const float* noise[kRowsPerHeadPass];
  for (int r = 0; r < pass.rows.rows; ++r) {
    noise[r] = tile.noise + r * gemm::kVocabTileTokens;
    gumbel_noise<W / 2>(pass.row[r].seed, pass.row[r].position, token, tokens,
                        tile.noise + r * gemm::kVocabTileTokens);
  }
  transpose_tile<W, true>(noise, pass.rows.rows, pass.rows.lanes(), tokens, tile.y);
}

// Largest y of each row. Returns whether one is NaN.
template <int W>
NABLA_FAST_INLINE bool find_tile_max(int rows, int lanes, int tokens, Tile& tile) {
  Ints<W> nan = {};
  for (int r = 0; r < rows; r += W) {
    Floats<W> top = splat<W>(-kInfinity);
    for (int t = 0; t < tokens; ++t) {
      const Floats<W> y = load<W>(tile.y + t * lanes + r);
      top = y > top ? y : top;
      nan |= y != y;
    }
    store<W>(tile.top + r, top);
  }
  return any_lane<W>(nan);
}

void note_nan(int rows, int lanes, int64_t token, int tokens, const Tile& tile,
              SegmentSums* found) {
  for (int r = 0; r < rows; ++r)
    for (int t = 0; t < tokens && found[r].nan < 0; ++t)
      if (std::isnan(tile.y[t * lanes + r])) found[r].nan = token + t;
}

// Sums of a row relative to its new maximum, at `token`.
NABLA_FAST_INLINE void rescale_to_new_max(const PassRow& row, float top, int64_t token,
                                          float inverse_tau, SegmentSums& found, float* plain,
                                          float* weighted_grad, int64_t width) {
  const float drop = (found.max - top) * inverse_tau;
  const double scale = drop > kMinScaledExponent ? std::exp(static_cast<double>(drop)) : 0.0;
  const float centre = row.centred ? row.centre : row.grad[token];
  const float shift = row.centred ? 0.0f : found.centre - centre;
  found.max = top;
  found.token = token;
  found.centre = centre;
  if (scale == 0) {
    // Not by multiplication: G may be infinite where p is 0.
    found.sum = found.weighted_grad_sum = 0;
    if (plain) std::fill_n(plain, width, 0.0f);
    if (weighted_grad) std::fill_n(weighted_grad, width, 0.0f);
    return;
  }
  found.weighted_grad_sum =
      scale * (found.weighted_grad_sum + static_cast<double>(shift) * found.sum);
  found.sum *= scale;
  if (!plain) return;
  for (int64_t k = 0; k < width; ++k) {
    weighted_grad[k] = static_cast<float>(scale * (weighted_grad[k] + shift * plain[k]));
    plain[k] = static_cast<float>(scale * plain[k]);
  }
}

// Weights of both sums over head rows, and the sums of e and e (G - c) over the tile. stride: between
// tokens. kSloped: weights are multiplied by dz/du.
template <int W, bool kSloped>
NABLA_FAST_INLINE void exp_and_weighted_grad(int rows, int lanes, int tokens, float inverse_tau,
                                             float scale, int stride, Tile& tile) {
  const Floats<W> zero = {};
  // From the last vector to the first and from the first token to the last: lanes behind the last
  // row are overwritten by the next store.
  for (int r = (rows - 1) / W * W; r >= 0; r -= W) {
    const Floats<W> max = load<W>(tile.max + r), centre = load<W>(tile.centre + r);
    Floats<W> sum = {}, weighted_grad_sum = {};
    for (int t = 0; t < tokens; ++t) {
      const Floats<W> x = (load<W>(tile.y + t * lanes + r) - max) * inverse_tau;
      const Floats<W> g = load<W>(tile.grad + t * lanes + r) - centre;
      const Floats<W> e = x > kMinScaledExponent ? vec_exp_normal<W, kExpPower>(x) * scale : zero;
      const Floats<W> weighted_grad =
          x > kMinScaledExponent ? e * g : zero;  // G may be infinite where p is 0
      if constexpr (kSloped) {
        const Floats<W> slope = load<W>(tile.slope + t * lanes + r);
        store<W>(tile.weights + t * stride + r, e * slope);
        store<W>(tile.weights + t * stride + rows + r, weighted_grad * slope);
      } else {
        store<W>(tile.weights + t * stride + r, e);
        store<W>(tile.weights + t * stride + rows + r, weighted_grad);
      }
      sum += e;
      weighted_grad_sum += weighted_grad;
    }
    store<W>(tile.sum + r, sum);
    store<W>(tile.weighted_grad_sum + r, weighted_grad_sum);
  }
}

template <int W>
NABLA_FAST_INLINE void segment_kernel(const HeadPass& pass, int64_t first, int64_t last,
                                      SegmentSums* found, float* weighted_sums) {
  const int rows = pass.rows.rows, lanes = pass.rows.lanes(), stride = gemm::lanes_of(2 * rows);
  const int64_t width = padded(pass.head.width);
  const bool sloped = !pass.map.is_identity();
  Tile tile;
  for (float* array : {tile.weights, tile.max, tile.centre})
    std::fill_n(array,
                array == tile.weights ? (gemm::kVocabTileTokens + 1) * gemm::kRowsPerGroup
                                      : kRowsPerHeadPass,
                0.0f);
  if (weighted_sums) std::fill_n(weighted_sums, weighted_sums_floats(rows, pass.head.width), 0.0f);
  for (int r = 0; r < rows; ++r) found[r] = {0, 0, -kInfinity, 0, first, -1};
  for (int64_t token = first; token < last; token += gemm::kVocabTileTokens) {
    const int tokens = static_cast<int>(std::min<int64_t>(gemm::kVocabTileTokens, last - token));
    gemm::products(pass.rows, pass.head.from(token), tokens, false, tile.y);
    if (sloped) softmax::map_tile_kernel<W>(pass.map, token, tokens, lanes, tile.y, tile.slope);
    if (pass.noise) add_noise<W>(pass, token, tokens, tile);
    if (find_tile_max<W>(rows, lanes, tokens, tile))
      note_nan(rows, lanes, token, tokens, tile, found);
    for (int r = 0; r < rows; ++r) {
      if (!(tile.top[r] > found[r].max)) continue;
      int t = 0;
      while (tile.y[t * lanes + r] != tile.top[r]) ++t;
      float* const plain = weighted_sums ? weighted_sums + r * width : nullptr;
      float* const weighted_grad = weighted_sums ? weighted_sums + (rows + r) * width : nullptr;
      rescale_to_new_max(pass.row[r], tile.top[r], token + t, pass.inverse_tau, found[r], plain,
                         weighted_grad, width);
      tile.max[r] = found[r].max;
      tile.centre[r] = found[r].centre;
    }
    if (!weighted_sums) continue;
    const float* grad[kRowsPerHeadPass];
    for (int r = 0; r < rows; ++r) grad[r] = pass.row[r].grad + token;
    transpose_tile<W, false>(grad, rows, lanes, tokens, tile.grad);
    if (sloped)
      exp_and_weighted_grad<W, true>(rows, lanes, tokens, pass.inverse_tau, pass.scale, stride,
                                     tile);
    else
      exp_and_weighted_grad<W, false>(rows, lanes, tokens, pass.inverse_tau, pass.scale, stride,
                                      tile);
    for (int r = 0; r < rows; ++r) {
      found[r].sum += tile.sum[r];
      found[r].weighted_grad_sum += tile.weighted_grad_sum[r];
    }
    // The tile behind the next one, which products() has prefetched; it has more time to arrive.
    const gemm::Table tile_of_head = pass.head.from(token);
    Prefetcher prefetcher{static_cast<const char*>(pass.head.from(token + 2 * tokens).data)};
    if (pass.rows.terms)
      gemm::add_weighted_sums_amx(tile.weights, stride, 2 * rows, tile_of_head, tokens,
                                  weighted_sums, prefetcher);
    else if (pass.head.dtype == NABLA_FAST_FLOAT32)
      gemm::add_all_rows<W, gemm::kRowsAtOnce<W>, 4, float>(tile.weights, stride, 2 * rows,
                                                            tile_of_head, tokens, weighted_sums,
                                                            padded(pass.head.width), prefetcher);
    else
      gemm::add_all_rows<W, gemm::kRowsAtOnce<W>, 4, uint16_t>(tile.weights, stride, 2 * rows,
                                                               tile_of_head, tokens, weighted_sums,
                                                               padded(pass.head.width), prefetcher);
  }
}

// gradient[k] = sum_s scale_s (weighted_grad_s[k] + offset_s plain_s[k]), for all columns.
struct SegmentShare {
  double scale, offset;
  const float* plain;
  const float* weighted_grad;
};

NABLA_FAST_INLINE void add_shares_kernel(const SegmentShare* shares, int count, int64_t width,
                                         float* gradient) {
  constexpr int kColumns = 16;  // rows of sums have room for a multiple of it
  for (int64_t column = 0; column < width; column += kColumns) {
    double total[kColumns] = {};
    for (const SegmentShare* share = shares; share < shares + count; ++share) {
      const float* const plain = share->plain + column;
      const float* const weighted_grad = share->weighted_grad + column;
      for (int k = 0; k < kColumns; ++k)
        total[k] += share->scale * (weighted_grad[k] + share->offset * plain[k]);
    }
    const int64_t columns = std::min<int64_t>(kColumns, width - column);
    for (int64_t k = 0; k < columns; ++k) gradient[column + k] = static_cast<float>(total[k]);
  }
}

NABLA_FAST_FOR_EACH_ISA(sum_segment, segment_kernel<W>)
NABLA_FAST_FOR_EACH_ISA(add_shares, add_shares_kernel)

}  // namespace

void pass_segment(const HeadPass& pass, int64_t first, int64_t last, SegmentSums* found,
                  float* weighted_sums) {
  sum_segment(pass, first, last, found, weighted_sums);
}

HeadPassResult join_segments(const SegmentSums* found, const float* weighted_sums, int64_t segments,
                             int rows, int index, int64_t width, double tau, float* gradient) {
  const auto of = [&](int64_t s) -> const SegmentSums& { return found[s * rows + index]; };
  int64_t best = 0, nan = -1;
  for (int64_t s = 0; s < segments; ++s) {
    if (of(s).max > of(best).max) best = s;
    if (nan < 0) nan = of(s).nan;
  }
  HeadPassResult result{of(best).max, nan < 0 ? of(best).token : nan, nan >= 0, 0};
  if (!gradient) return result;
  const float centre = of(best).centre;
  SegmentShare shares[kMaxHeadSegments];
  int count = 0;
  double sum = 0, weighted_grad_sum = 0;
  for (int64_t s = 0; s < segments; ++s) {
    const double drop = (static_cast<double>(of(s).max) - of(best).max) / tau;
    if (!(drop > kMinScaledExponent)) continue;
    // Equal centres may be infinite, and their difference NaN.
    const double shift = of(s).centre == centre ? 0.0 : static_cast<double>(of(s).centre) - centre;
    const double scale = std::exp(drop);
    sum += scale * of(s).sum;
    weighted_grad_sum += scale * (of(s).weighted_grad_sum + shift * of(s).sum);
    const float* const plain =
        weighted_sums + s * weighted_sums_floats(rows, width) + index * padded(width);
    shares[count++] = {scale, shift, plain, plain + rows * padded(width)};
  }
  result.mean = weighted_grad_sum / sum;
  for (int n = 0; n < count; ++n) {
    shares[n].scale /= sum * tau;
    shares[n].offset -= result.mean;
  }
  add_shares(shares, count, width, gradient);
  return result;
}

}  // namespace nabla_fast::descent
