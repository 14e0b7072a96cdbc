// A thread's columns of the rows that descend on hidden states: h, and the sums over the tokens of a pass,
// sum e w and sum e (G - base) w, that the gradient of h is made of.
#ifndef NABLA_FAST_CUDA_LATENTS_COLUMNS_H_
#define NABLA_FAST_CUDA_LATENTS_COLUMNS_H_

#include "descent_row.h"
#include "device.h"
#include "head_tiles.h"
#include "joins.h"

namespace nabla_fast::cuda {

// Products that a warp sums at a time: of so many tokens and rows.
constexpr int kProducts = 16;

// Wide loads of a thread that are under way at a time; more take registers that are not there.
constexpr int kLoadsAtOnce = 4;
// Tokens that are multiplied with an element of h in shared memory: there are no registers for more.
constexpr int kMultipliedAtOnce = 2;

// What a row's tile adds with: e and e (G - base) of a token.
struct alignas(8) TokenWeights {
  float plain, tilted;
};

// How the sums of a row so far turn into sums relative to another top and base, and how to add to them.
struct TileChange {
  float scale, shift;
  int32_t changed;
  int32_t careful;  // a logit is no number: tokens without weight may be anything
};

// A lane keeps half of its values and hands the others to the lane that keeps those, again and again.
template <int kHalf>
NABLA_FAST_DEVICE void sum_halves(float (&value)[kProducts]) {
  const bool upper = lane() & 2 * kHalf;
  NABLA_FAST_UNROLL
  for (int n = 0; n < kHalf; ++n) {
    const float kept = upper ? value[n + kHalf] : value[n];
    const float handed = upper ? value[n] : value[n + kHalf];
    value[n] = kept + shuffle_xor(handed, unsigned{2 * kHalf});
  }
  if constexpr (kHalf > 1) sum_halves<kHalf / 2>(value);
}

// Sums of kProducts values over the lanes of a warp: of number n for lanes 2 n and 2 n + 1.
NABLA_FAST_DEVICE float sums_of_warp(float (&value)[kProducts]) {
  sum_halves<kProducts / 2>(value);
  return value[0] + shuffle_xor(value[0], 1);
}

// kColumns of a thread: kUnits times kWide<T> that are next to each other.
template <typename T, int kRows, int kColumns>
class LatentsColumns {
 public:
  static constexpr int kUnits = kColumns / kWide<T>;
  static constexpr int kBatch = kProducts / kRows;  // tokens that are multiplied at a time
  static constexpr int kTokensAtOnce = kUnits < kLoadsAtOnce ? kLoadsAtOnce / kUnits : 1;
  // Whether registers have room for h beside the sums. Else it is in shared memory, and read for
  // kMultipliedAtOnce tokens at a time.
  static constexpr bool kHeld = kRows <= 2 && kColumns <= 8;
  // float32 elements of h in shared memory, of a warp that has columns.
  static constexpr int kShared = kHeld ? 0 : kRows * kColumns * static_cast<int>(kWarpThreads);

  // warps: that have columns.
  NABLA_FAST_DEVICE LatentsColumns(int width, int warps, float* shared)
      : width_(width), warps_(warps), shared_(reinterpret_cast<Four<float>*>(shared)) {}

  // Begins a pass. row(r): h of row r.
  template <typename RowOf>
  NABLA_FAST_DEVICE void begin(const RowOf& row) {
    NABLA_FAST_UNROLL
    for (int r = 0; r < kRows; ++r) NABLA_FAST_UNROLL
    for (int n = 0; n < kColumns; ++n) plain_[r][n] = tilted_[r][n] = 0;
    if constexpr (kHeld) {
      NABLA_FAST_UNROLL
      for (int r = 0; r < kRows; ++r) NABLA_FAST_UNROLL
      for (int n = 0; n < kColumns; ++n) h_[r][n] = element(row(r), n);
      return;
    }
    if (warp() >= warps_) return;
    NABLA_FAST_KEEP_LOOP
    for (int r = 0; r < kRows; ++r) NABLA_FAST_UNROLL
    for (int n = 0; n < kColumns; n += 4) {
      Four<float> h;
      for (int k = 0; k < 4; ++k) h.of[k] = element(row(r), n + k);
      store_four(place(r, n)->of, h);
    }
  }

  // Products of a tile's tokens with this warp's columns of h: number token * kRows + r of `products`.
  NABLA_FAST_DEVICE void multiply(const T* tile, int stride, int tokens, float* products) const {
    if (warp() >= warps_) return;
    for (int first = 0; first < tokens; first += kBatch) {
      float part[kProducts] = {};
      // Tokens past the end stand for nothing: any other's will do.
      const auto token = [&](int n) {
        return tile + (first + n < tokens ? first + n : first) * stride;
      };
      if constexpr (kHeld)
        multiply_held(token, part);
      else
        multiply_shared(token, part);
      const float sum = sums_of_warp(part);
      if (lane() % 2 == 0) products[first * kRows + lane() / 2] = sum;
    }
  }

  NABLA_FAST_DEVICE void change(const TileChange (&changes)[kRows]) {
    NABLA_FAST_UNROLL
    for (int r = 0; r < kRows; ++r) {
      if (!changes[r].changed) continue;
      const float scale = changes[r].scale, shift = changes[r].shift;
      NABLA_FAST_UNROLL
      for (int n = 0; n < kColumns; ++n) {
        tilted_[r][n] = fmaf(shift, plain_[r][n], tilted_[r][n]) * scale;
        plain_[r][n] *= scale;
      }
    }
  }

  // Adds a tile's tokens. weights: [tokens, kRows], and zeros up to kMostTileTokens.
  NABLA_FAST_DEVICE void add(const T* tile, int stride, int tokens, bool careful,
                             const TokenWeights* weights) {
    constexpr int kAtOnce = kHeld ? kTokensAtOnce : 1;
    if (warp() >= warps_) return;
    NABLA_FAST_KEEP_LOOP
    for (int first = 0; first < tokens; first += kAtOnce) {
      NABLA_FAST_UNROLL
      for (int unit = 0; unit < kUnits; ++unit) {
        const int column = column_of<T>(unit);
        if (column >= width_) continue;
        NABLA_FAST_UNROLL
        for (int n = 0; n < kAtOnce; ++n) {
          float w[kWide<T>];
          to_floats(load_wide(tile + (first + n < tokens ? first + n : first) * stride + column),
                    w);
          NABLA_FAST_UNROLL
          for (int r = 0; r < kRows; ++r)
            add_unit(r, unit, w, weights[(first + n) * kRows + r], careful);
        }
      }
    }
  }

  // Writes the sums: plain ones of row r at sums + 2 r * pitch, then the tilted ones.
  NABLA_FAST_DEVICE void store(float* sums, int64_t pitch) const {
    NABLA_FAST_UNROLL
    for (int r = 0; r < kRows; ++r) NABLA_FAST_UNROLL
    for (int n = 0; n < kColumns; n += 4) {
      const int column = column_anew<T>(n / kWide<T>) + n % kWide<T>;
      if (column >= width_) continue;
      Four<float> plain, tilted;
      for (int k = 0; k < 4; ++k) {
        plain.of[k] = plain_[r][n + k];
        tilted.of[k] = tilted_[r][n + k];
      }
      store_four(sums + 2 * r * pitch + column, plain);
      store_four(sums + (2 * r + 1) * pitch + column, tilted);
    }
  }

 private:
  // Of a row, in column number n of this thread.
  NABLA_FAST_DEVICE float element(const float* row, int n) const {
    const int column = column_anew<T>(n / kWide<T>) + n % kWide<T>;
    return column < width_ ? row[column] : 0;
  }

  template <typename TokenOf>
  NABLA_FAST_DEVICE void multiply_held(const TokenOf& token, float (&part)[kProducts]) const {
    NABLA_FAST_UNROLL
    for (int first = 0; first < kBatch; first += kTokensAtOnce) {
      // Else a compiler moves all loads to the front.
      sync_warp();
      NABLA_FAST_UNROLL
      for (int unit = 0; unit < kUnits; ++unit) {
        const int column = column_of<T>(unit);
        if (column >= width_) continue;
        NABLA_FAST_UNROLL
        for (int n = first; n < first + kTokensAtOnce; ++n) {
          float w[kWide<T>];
          to_floats(load_wide(token(n) + column), w);
          NABLA_FAST_UNROLL
          for (int r = 0; r < kRows; ++r) NABLA_FAST_UNROLL
          for (int k = 0; k < kWide<T>; ++k)
            part[n * kRows + r] = fmaf(h_[r][unit * kWide<T> + k], w[k], part[n * kRows + r]);
        }
      }
    }
  }

  template <typename TokenOf>
  NABLA_FAST_DEVICE void multiply_shared(const TokenOf& token, float (&part)[kProducts]) const {
    NABLA_FAST_UNROLL
    for (int first = 0; first < kBatch; first += kMultipliedAtOnce) NABLA_FAST_UNROLL
    for (int column = 0; column < kColumns; column += 4) {
      const int at = column_of<T>(column / kWide<T>) + column % kWide<T>;
      // As in multiply_held().
      sync_warp();
      if (at >= width_) continue;
      float w[kMultipliedAtOnce][4];
      NABLA_FAST_UNROLL
      for (int n = 0; n < kMultipliedAtOnce; ++n) {
        const Four<T> four = load_four(token(first + n) + at);
        for (int k = 0; k < 4; ++k) w[n][k] = to_float(four.of[k]);
      }
      NABLA_FAST_UNROLL
      for (int r = 0; r < kRows; ++r) {
        const Four<float> h = load_four(place(r, column)->of);
        NABLA_FAST_UNROLL
        for (int n = 0; n < kMultipliedAtOnce; ++n) {
          float& sum = part[(first + n) * kRows + r];
          NABLA_FAST_UNROLL
          for (int k = 0; k < 4; ++k) sum = fmaf(h.of[k], w[n][k], sum);
        }
      }
    }
  }

  // Four columns of h in shared memory, from number n of this thread on. Neighbours' are side by side.
  NABLA_FAST_DEVICE Four<float>* place(int r, int n) const {
    return shared_ + (r * kColumns + n) / 4 * warps_ * static_cast<int>(kWarpThreads) +
           static_cast<int>(threadIdx.x);
  }

  NABLA_FAST_DEVICE void add_unit(int r, int unit, const float (&w)[kWide<T>],
                                  const TokenWeights& weight, bool careful) {
    // Infinite elements of the head times 0.
    if (careful && weight.plain == 0) return;
    NABLA_FAST_UNROLL
    for (int k = 0; k < kWide<T>; ++k) {
      float& plain = plain_[r][unit * kWide<T> + k];
      float& tilted = tilted_[r][unit * kWide<T> + k];
      plain = fmaf(weight.plain, w[k], plain);
      tilted = fmaf(weight.tilted, w[k], tilted);
    }
  }

  const int width_, warps_;
  Four<float>* const shared_;
  float h_[kHeld ? kRows : 1][kHeld ? kColumns : 1];
  float plain_[kRows][kColumns], tilted_[kRows][kColumns];
};

}  // namespace nabla_fast::cuda

#endif  // NABLA_FAST_CUDA_LATENTS_COLUMNS_H_
