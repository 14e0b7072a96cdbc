// A block's tokens of a row that descends: where they are kept from the first step to the last, and
// what a step does to them.
//
// Four tokens of a thread stand together, in tiles of 2,048 tokens of a block. The first tiles keep z,
// both moments and e = exp((y - reference) / tau) in registers, the next ones all but e in shared
// memory, and what has no place there in a workspace. G and the noise of all tiles lie in memory.
#ifndef NABLA_FAST_CUDA_DESCENT_ROW_H_
#define NABLA_FAST_CUDA_DESCENT_ROW_H_

#include "adam.h"
#include "device.h"
#include "exponential.h"
#include "gumbel.h"
#include "joins.h"
#include "slices.h"

namespace nabla_fast::cuda {

constexpr int kDescentThreads = 512;
constexpr int kDescentWarps = kDescentThreads / kWarpThreads;
constexpr int kTileTokens = 4 * kDescentThreads;
// In registers, of which a cooperative grid's barrier and noise take some, too.
template <bool kGrid, bool kNoise>
constexpr int kTilesHeld = kGrid ? kNoise ? 2 : 3 : 4;

// float32 arrays of a tile in memory, each of kTileTokens elements.
enum TileArray { kGradArray, kNoiseArray };
template <bool kNoise>
constexpr int kHeldArrays = kNoise ? 2 : 1;
// Of a tile that is not in registers: z and both moments after those.
template <bool kNoise>
constexpr int kTileArrays = kHeldArrays<kNoise> + 3;

template <bool kNoise>
constexpr int64_t kHeldElements = int64_t{kHeldArrays<kNoise>} * kTileTokens;
template <bool kNoise>
constexpr int64_t kTileElements = int64_t{kTileArrays<kNoise>} * kTileTokens;

// What a thread, a warp, a block or all blocks of a row have found among their tokens.
struct RowPart {
  float sum;         // of e
  float tilt;        // of e (G - G[token of the row])
  float top;         // the largest y, NaN if one is
  int token;         // the first that has it
  int32_t spoiled;   // whether G is not finite at a token of some probability
  int32_t finished;  // whether the row takes no more steps
};
constexpr int kNoToken = 0x7FFFFFFF;
NABLA_FAST_DEVICE RowPart no_part() { return {0, 0, -kInfinity, kNoToken, 0, 0}; }

NABLA_FAST_DEVICE bool same_number(float a, float b) { return a == b || (a != a && b != b); }

struct JoinParts {
  NABLA_FAST_DEVICE RowPart operator()(const RowPart& a, const RowPart& b) const {
    const float top = max_or_nan(a.top, b.top);
    const int token_a = same_number(a.top, top) ? a.token : kNoToken;
    const int token_b = same_number(b.top, top) ? b.token : kNoToken;
    return {
        a.sum + b.sum,         a.tilt + b.tilt,        top, token_a < token_b ? token_a : token_b,
        a.spoiled | b.spoiled, a.finished | b.finished};
  }
};

NABLA_FAST_DEVICE RowPart shuffle_xor(const RowPart& part, unsigned lanes) {
  return {shuffle_xor(part.sum, lanes),     shuffle_xor(part.tilt, lanes),
          shuffle_xor(part.top, lanes),     shuffle_xor(part.token, lanes),
          shuffle_xor(part.spoiled, lanes), shuffle_xor(part.finished, lanes)};
}

// Numbers of a step along weight e (G - G[token] - mean).
struct Step {
  float weight;  // 1 / (S tau)
  float mean;    // T / S, times the weight
  AdamRate adam;
};

template <bool kNoise, int kHeldTiles>
class TokensOfBlock {
 public:
  // held: kHeldTiles times kHeldElements, shared: `shared_tiles` times kTileElements, spilled: as many more as there
  // are tiles.
  NABLA_FAST_DEVICE TokensOfBlock(int begin, int end, float* held, float* shared, int shared_tiles,
                                  float* spilled)
      : begin_(begin),
        end_(end),
        tiles_(end > begin ? (end - begin + kTileTokens - 1) / kTileTokens : 0),
        held_(held),
        shared_(shared),
        shared_tiles_(shared_tiles),
        spilled_(spilled) {}

  // Reads the tokens. Those past the end count as masked ones. `grad` is read later, too.
  NABLA_FAST_DEVICE void load(const float* z, const float* m, const float* v, const float* grad,
                              int64_t seed, int64_t position) {
    grad_ = grad;
    const auto read = [&](int token, float* at, float (&z4)[4], float (&m4)[4], float (&v4)[4]) {
      load_row(z, token, -kInfinity, z4);
      load_row(m, token, 0, m4);
      load_row(v, token, 0, v4);
      Four<float> g;
      load_row(grad, token, 0, g.of);
      store_four(place(at, kGradArray), g);
    };
    // Before registers hold tokens: doubles take many.
    for (int t = 0; kNoise && t < tiles_; ++t)
      store_four(place(t < kHeldTiles ? held_tile(t) : tile(t), kNoiseArray),
                 gumbel_four(seed, position, token_of(t)));
    NABLA_FAST_UNROLL
    for (int t = 0; t < kHeldTiles; ++t)
      if (t < tiles_) read(token_of(t), held_tile(t), z_[t], m_[t], v_[t]);
    for (int t = kHeldTiles; t < tiles_; ++t) {
      Kept kept;
      read(token_of(t), tile(t), kept.z.of, kept.m.of, kept.v.of);
      kept.store(tile(t));
    }
  }

  // The largest y, without sums.
  NABLA_FAST_DEVICE RowPart find_top() {
    RowPart found = no_part();
    const auto look = [&](const float* at, const float (&z)[4]) {
      const Four<float> y = perturbed(at, z);
      for (int k = 0; k < 4; ++k) found.top = max_or_nan(found.top, y.of[k]);
    };
    NABLA_FAST_UNROLL
    for (int t = 0; t < kHeldTiles; ++t)
      if (t < tiles_) look(held_tile(t), z_[t]);
    for (int t = kHeldTiles; t < tiles_; ++t) look(tile(t), Kept(tile(t)).z.of);
    return found;
  }

  // Subtracts G of the row's token from all. Masked tokens have none, nor has one that is not finite:
  // it matters where e is not 0.
  NABLA_FAST_DEVICE void centre_grad(float grad) {
    centre_ = grad;
    const auto subtract = [&](float* at, const float (&z)[4]) {
      Four<float> g = load_four(place(at, kGradArray));
      for (int k = 0; k < 4; ++k) {
        g.of[k] = z[k] == -kInfinity ? 0 : g.of[k] - grad;
        if (fabsf(g.of[k]) < kInfinity) continue;
        g.of[k] = 0;
        finite_ = false;
      }
      store_four(place(at, kGradArray), g);
    };
    NABLA_FAST_UNROLL
    for (int t = 0; t < kHeldTiles; ++t)
      if (t < tiles_) subtract(held_tile(t), z_[t]);
    for (int t = kHeldTiles; t < tiles_; ++t) subtract(tile(t), Kept(tile(t)).z.of);
  }

  // Sums relative to a reference.
  NABLA_FAST_DEVICE RowPart measure(float reference, const Temperature& tau) {
    RowPart found = no_part();
    NABLA_FAST_UNROLL
    for (int t = 0; t < kHeldTiles; ++t)
      if (t < tiles_) add(held_tile(t), token_of(t), z_[t], reference, tau, e_[t], found);
    for (int t = kHeldTiles; t < tiles_; ++t) {
      float e[4];
      add(tile(t), token_of(t), Kept(tile(t)).z.of, reference, tau, e, found);
    }
    return found;
  }

  // Takes a step whose sums were relative to `reference`, and the sums of the next one.
  NABLA_FAST_DEVICE RowPart step(const Step& step, float reference, const Temperature& tau) {
    RowPart found = no_part();
    NABLA_FAST_UNROLL
    for (int t = 0; t < kHeldTiles; ++t) {
      if (t >= tiles_) continue;
      move(step, held_tile(t), token_of(t), e_[t], z_[t], m_[t], v_[t]);
      add(held_tile(t), token_of(t), z_[t], reference, tau, e_[t], found);
    }
    for (int t = kHeldTiles; t < tiles_; ++t) {
      float* const at = tile(t);
      Kept kept(at);
      float e[4];
      exponentials(at, kept.z.of, reference, tau, e);
      move(step, at, token_of(t), e, kept.z.of, kept.m.of, kept.v.of);
      kept.store(at);
      add(at, token_of(t), kept.z.of, reference, tau, e, found);
    }
    return found;
  }

  // The first of this thread's tokens whose y is `top`.
  NABLA_FAST_DEVICE int first_with(float top) const {
    int first = kNoToken;
    const auto look = [&](int t, const float* at, const float (&z)[4]) {
      const Four<float> y = perturbed(at, z);
      for (int k = 0; k < 4; ++k)
        if (first == kNoToken && same_number(y.of[k], top)) first = token_of(t) + k;
    };
    NABLA_FAST_UNROLL
    for (int t = 0; t < kHeldTiles; ++t)
      if (t < tiles_) look(t, held_tile(t), z_[t]);
    for (int t = kHeldTiles; t < tiles_; ++t) look(t, tile(t), Kept(tile(t)).z.of);
    return first;
  }

  // Writes the tokens back; NaN if they are `spoiled`.
  NABLA_FAST_DEVICE void store(float* z, float* m, float* v, bool spoiled) const {
    const auto write = [&](int token, const float (&z4)[4], const float (&m4)[4],
                           const float (&v4)[4]) {
      store_row(z4, token, spoiled, z);
      store_row(m4, token, spoiled, m);
      store_row(v4, token, spoiled, v);
    };
    NABLA_FAST_UNROLL
    for (int t = 0; t < kHeldTiles; ++t)
      if (t < tiles_) write(token_of(t), z_[t], m_[t], v_[t]);
    for (int t = kHeldTiles; t < tiles_; ++t) {
      const Kept kept(tile(t));
      write(token_of(t), kept.z.of, kept.m.of, kept.v.of);
    }
  }

 private:
  // This thread's place in an array of a tile in memory.
  NABLA_FAST_DEVICE static float* place(float* tile, int array) {
    return tile + array * kTileTokens + 4 * static_cast<int>(threadIdx.x);
  }
  NABLA_FAST_DEVICE static const float* place(const float* tile, int array) {
    return tile + array * kTileTokens + 4 * static_cast<int>(threadIdx.x);
  }

  // What a tile keeps that is not in registers.
  struct Kept {
    Four<float> z, m, v;

    NABLA_FAST_DEVICE Kept() {}
    NABLA_FAST_DEVICE explicit Kept(const float* tile)
        : z(load_four(place(tile, kFirst))),
          m(load_four(place(tile, kFirst + 1))),
          v(load_four(place(tile, kFirst + 2))) {}
    NABLA_FAST_DEVICE void store(float* tile) const {
      store_four(place(tile, kFirst), z);
      store_four(place(tile, kFirst + 1), m);
      store_four(place(tile, kFirst + 2), v);
    }
    static constexpr int kFirst = kHeldArrays<kNoise>;
  };

  NABLA_FAST_DEVICE int token_of(int tile) const {
    return begin_ + tile * kTileTokens + 4 * static_cast<int>(threadIdx.x);
  }
  NABLA_FAST_DEVICE float* held_tile(int t) const {
    return held_ + t * static_cast<int>(kHeldElements<kNoise>);
  }
  NABLA_FAST_DEVICE float* tile(int t) const {
    const int n = t - kHeldTiles;
    if (n < shared_tiles_) return shared_ + n * static_cast<int>(kTileElements<kNoise>);
    return spilled_ + (n - shared_tiles_) * kTileElements<kNoise>;
  }

  // y = z + noise.
  NABLA_FAST_DEVICE static Four<float> perturbed(const float* tile, const float (&z)[4]) {
    Four<float> y;
    for (int k = 0; k < 4; ++k) y.of[k] = z[k];
    if (!kNoise) return y;
    const Four<float> noise = load_four(place(tile, kNoiseArray));
    for (int k = 0; k < 4; ++k) y.of[k] += noise.of[k];
    return y;
  }

  NABLA_FAST_DEVICE void load_row(const float* row, int token, float fill, float (&four)[4]) const {
    if (lies_for_fours(row) && token + 4 <= end_) {
      const Four<float> read = load_four(row + token);
      for (int k = 0; k < 4; ++k) four[k] = read.of[k];
    } else {
      for (int k = 0; k < 4; ++k) four[k] = token + k < end_ ? row[token + k] : fill;
    }
  }

  NABLA_FAST_DEVICE void store_row(const float (&four)[4], int token, bool spoiled,
                                   float* row) const {
    Four<float> written;
    for (int k = 0; k < 4; ++k) written.of[k] = spoiled ? kNaN : four[k];
    if (lies_for_fours(row) && token + 4 <= end_) {
      store_four(row + token, written);
    } else {
      for (int k = 0; k < 4; ++k)
        if (token + k < end_) row[token + k] = written.of[k];
    }
  }

  NABLA_FAST_DEVICE static void exponentials(const float* tile, const float (&z)[4],
                                             float reference, const Temperature& tau,
                                             float (&e)[4]) {
    const Four<float> y = perturbed(tile, z);
    for (int k = 0; k < 4; ++k) e[k] = tempered_exp(y.of[k] - reference, tau);
  }

  NABLA_FAST_DEVICE void move(const Step& step, const float* tile, int token, const float (&e)[4],
                              float (&z)[4], float (&m)[4], float (&v)[4]) const {
    const Four<float> g = load_four(place(tile, kGradArray));
    for (int k = 0; k < 4; ++k) {
      // G may be so large where p is 0 that the rest overflows.
      const float gradient = e[k] > 0 ? e[k] * fmaf(g.of[k], step.weight, -step.mean) : 0;
      adam_step(gradient, step.adam, z[k], m[k], v[k]);
    }
    // An infinite rate makes NaN of what does not move.
    if (fabsf(step.adam.rate) < kInfinity) return;
    for (int k = 0; k < 4; ++k)
      if (token + k >= end_) z[k] = -kInfinity;
  }

  // Adds tokens to a part, and leaves their e.
  NABLA_FAST_DEVICE void add(const float* tile, int token, const float (&z)[4], float reference,
                             const Temperature& tau, float (&e)[4], RowPart& part) const {
    const Four<float> y = perturbed(tile, z), g = load_four(place(tile, kGradArray));
    for (int k = 0; k < 4; ++k) {
      part.top = max_or_nan(part.top, y.of[k]);
      e[k] = tempered_exp(y.of[k] - reference, tau);
    }
    part.sum += (e[0] + e[1]) + (e[2] + e[3]);
    part.tilt += fmaf(e[0], g.of[0], e[1] * g.of[1]) + fmaf(e[2], g.of[2], e[3] * g.of[3]);
    if (finite_) return;
    for (int k = 0; k < 4; ++k)
      part.spoiled |=
          token + k < end_ && e[k] > 0 && !(fabsf(grad_[token + k] - centre_) < kInfinity);
  }

  const int begin_, end_, tiles_;
  float *const held_, *const shared_;
  const int shared_tiles_;
  float* const spilled_;
  const float* grad_ = nullptr;
  float centre_ = 0;
  bool finite_ = true;  // whether G of this thread's tokens is, relative to the row's
  float z_[kHeldTiles][4], m_[kHeldTiles][4], v_[kHeldTiles][4], e_[kHeldTiles][4];
};

}  // namespace nabla_fast::cuda

#endif  // NABLA_FAST_CUDA_DESCENT_ROW_H_
