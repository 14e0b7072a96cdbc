// What a model does to the products u of its head and hidden states before the softmax: logits are
// z = c tanh(s (u + b) / c), or s (u + b) where there is no cap c.
#ifndef NABLA_FAST_CPU_SOFTMAX_HEAD_MAP_H_
#define NABLA_FAST_CPU_SOFTMAX_HEAD_MAP_H_

#include <cmath>
#include <cstdint>
#include <cstring>

#include "base/check.h"
#include "base/isa.h"
#include "base/overlap.h"
#include "nabla_fast.h"
#include "simd/vec.h"
#include "simd/vec_tanh.h"

namespace nabla_fast::softmax {

// OK, or why a map over `vocab` tokens is refused.
inline nabla_fast_status check_head_map(const nabla_fast_head_map& map, int64_t vocab) {
  if (map.softcap != 0 && !(map.softcap >= 0x1p-64 && map.softcap <= 0x1p64))
    return NABLA_FAST_INVALID_SOFTCAP;
  if (!std::isfinite(static_cast<float>(map.scale))) return NABLA_FAST_INVALID_SCALE;
  return fits({{vocab, 1}}, sizeof(float)) ? NABLA_FAST_OK : NABLA_FAST_TOO_LARGE;
}

struct HeadMap {
  const float* bias;  // [vocab] b, or null
  float scale;        // s
  float softcap;      // c; 0: none

  explicit HeadMap(const nabla_fast_head_map& map)
      : bias(map.bias),
        scale(map.scale == 0 ? 1.0f : static_cast<float>(map.scale)),
        softcap(static_cast<float>(map.softcap)) {}

  bool is_identity() const { return !bias && scale == 1 && softcap == 0; }
  // dz/du at a logit z.
  float slope(float z) const {
    const float t = softcap == 0 ? 0.0f : z / softcap;
    return scale * (1 - t * t);
  }
};

// z of u, and dz/du.
template <int W>
NABLA_FAST_INLINE Floats<W> mapped(const HeadMap& map, Floats<W> u, Floats<W> bias,
                                   Floats<W>& slope) {
  const Floats<W> z = (u + bias) * map.scale;
  slope = splat<W>(map.scale);
  if (map.softcap == 0) return z;
  const Floats<W> t = vec_tanh<W>(z / map.softcap);
  slope *= 1.0f - t * t;
  return map.softcap * t;
}

// u of a tile [tokens, lanes] from `token` on to z, in place. slope: dz/du likewise, or null.
template <int W>
NABLA_FAST_INLINE void map_tile_kernel(const HeadMap& map, int64_t token, int tokens, int lanes,
                                       float* tile, float* slope) {
  for (int t = 0; t < tokens; ++t) {
    const Floats<W> bias = splat<W>(map.bias ? map.bias[token + t] : 0.0f);
    for (int lane = 0; lane < lanes; lane += W) {
      const int at = t * lanes + lane;
      Floats<W> derivative;
      store<W>(tile + at, mapped<W>(map, load<W>(tile + at), bias, derivative));
      if (slope) store<W>(slope + at, derivative);
    }
  }
}

// The same of a row of `tokens` products.
template <int W>
NABLA_FAST_INLINE void map_row_kernel(const HeadMap& map, int64_t token, int64_t tokens, float* row,
                                      float* slope) {
  for (int64_t t = 0; t < tokens; t += W) {
    const size_t bytes = sizeof(float) * static_cast<size_t>(tokens - t < W ? tokens - t : W);
    Floats<W> u = {}, bias = {}, derivative;
    std::memcpy(&u, row + t, bytes);
    if (map.bias) std::memcpy(&bias, map.bias + token + t, bytes);
    u = mapped<W>(map, u, bias, derivative);
    std::memcpy(row + t, &u, bytes);
    if (slope) std::memcpy(slope + t, &derivative, bytes);
  }
}

// map_tile_kernel() at the level in force.
void map_tile(const HeadMap& map, int64_t token, int tokens, int lanes, float* tile, float* slope);

}  // namespace nabla_fast::softmax

#endif  // NABLA_FAST_CPU_SOFTMAX_HEAD_MAP_H_
