// A warp's tokens of a row that descends on hidden states, a tile of the head at a time: their logits, their
// weights, and the sums over a block's tokens relative to the largest logit so far.
#ifndef NABLA_FAST_CUDA_LATENTS_TOKENS_H_
#define NABLA_FAST_CUDA_LATENTS_TOKENS_H_

#include "descent_row.h"
#include "descent_team.h"
#include "device.h"
#include "exponential.h"
#include "joins.h"
#include "latents_columns.h"

namespace nabla_fast::cuda {

// What a block has found of a row in a pass. Sums are relative to its top and base.
struct BlockPart {
  RowPart found;
  float base;     // G of the token of the largest number
  float spoiled;  // the largest y at which G is not finite
};

// The largest number of a warp's logits.
struct Leader {
  float y;
  int token;
  float grad;
};

NABLA_FAST_DEVICE Leader shuffle_xor(const Leader& leader, unsigned lanes) {
  return {shuffle_xor(leader.y, lanes), shuffle_xor(leader.token, lanes),
          shuffle_xor(leader.grad, lanes)};
}

struct Foremost {
  NABLA_FAST_DEVICE Leader operator()(const Leader& a, const Leader& b) const {
    return b.y > a.y || (b.y == a.y && b.token < a.token) ? b : a;
  }
};

NABLA_FAST_DEVICE bool is_number(float x) { return fabsf(x) < kInfinity; }

// What a lane has found in a pass so far, and what it has read ahead.
struct TokensSoFar {
  const float *grad_row, *noise_row;  // noise: null for none
  float sum, tilt, top;
  int token;
  float reference, base;  // the same in all lanes
  float spoiled;
  float grad, noise;  // of its next token
};

// A lane has one token of a tile.
class LatentsTokens {
 public:
  // so_far: in registers, or where there is room.
  NABLA_FAST_DEVICE explicit LatentsTokens(TokensSoFar& so_far) : so_far_(so_far) {}

  // Begins a pass, whose first tile has so many tokens. grad, noise: of the row; noise null for none.
  NABLA_FAST_DEVICE void begin(const float* grad, const float* noise, int first, int tokens) {
    TokensSoFar fresh = {grad, noise, 0, 0, -kInfinity, kNoToken, -kInfinity, 0, -kInfinity, 0, 0};
    look_ahead(first, tokens, fresh);
    so_far_ = fresh;
  }

  // Takes the logit of this lane's token, one of a tile of tokens from `first` on. weight: the token's.
  // Of the next tile, of so many tokens from `next` on, it reads what there is before logits are known.
  NABLA_FAST_DEVICE TileChange meet(float z, int first, int tokens, int next, int next_tokens,
                                    const Temperature& tau, TokenWeights& weight) {
    TokensSoFar now = so_far_;
    const bool there = lane() < tokens;
    const int token = first + lane();
    const float y = there ? z + now.noise : -kInfinity, g = there ? now.grad : 0;
    look_ahead(next, next_tokens, now);
    // A lane's tokens come in order.
    const bool first_nan = y != y && now.top == now.top;
    if (there && (now.token == kNoToken || y > now.top || first_nan)) {
      now.top = y;
      now.token = token;
    }
    TileChange change = {1, 0, 0, any_of_warp(there && !is_number(y))};
    if (any_of_warp(y > now.reference)) {
      const Leader leader = join_warp(Leader{y == y ? y : -kInfinity, token, g}, Foremost{});
      const float base = is_number(leader.grad) ? leader.grad : 0;
      change = {tempered_exp(now.reference - leader.y, tau), now.base - base, 1, change.careful};
      now.tilt = fmaf(change.shift, now.sum, now.tilt) * change.scale;
      now.sum *= change.scale;
      now.reference = leader.y;
      now.base = base;
    }
    const float e = tempered_exp(y - now.reference, tau);
    float centred = g - now.base;
    // It matters if the token has some probability in the end.
    if (!is_number(centred) || !is_number(g)) {
      centred = 0;
      if (y == y) now.spoiled = fmaxf(now.spoiled, y);
    }
    weight = {e, e * centred};
    now.sum += weight.plain;
    now.tilt += weight.tilted;
    so_far_ = now;
    return change;
  }

  // Of all tokens of the pass; every lane's result is the same.
  NABLA_FAST_DEVICE BlockPart part() const {
    const TokensSoFar now = so_far_;
    return {join_lanes({now.sum, now.tilt, now.top, now.token, 0, 0}), now.base,
            join_warp(now.spoiled, Largest{})};
  }

 private:
  NABLA_FAST_DEVICE static void look_ahead(int first, int tokens, TokensSoFar& into) {
    if (lane() >= tokens) return;
    into.grad = into.grad_row[first + lane()];
    into.noise = into.noise_row ? into.noise_row[first + lane()] : 0;
  }

  TokensSoFar& so_far_;
};

}  // namespace nabla_fast::cuda

#endif  // NABLA_FAST_CUDA_LATENTS_TOKENS_H_
