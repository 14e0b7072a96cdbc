// Passes over a chunk of a row of dto_descent: its largest y, the sums that a step needs, and a
// step.
#ifndef NABLA_FAST_CPU_OPS_DTO_DESCENT_CHUNKS_H_
#define NABLA_FAST_CPU_OPS_DTO_DESCENT_CHUNKS_H_

#include <cstdint>

#include "nabla_fast.h"
#include "ops/dto_descent.h"
#include "softmax/tau.h"

namespace nabla_fast::descent {

constexpr int64_t kChunkTokens = 1024;

// Arrays of a row, or of a chunk of it.
struct Row {
  float* z;
  const float* grad;
  float* exp_avg;
  float* exp_avg_sq;
  float* e;            // exp((y - M) / tau) as the last sums took it; null before the first
  const float* noise;  // null where there is none

  Row from(int64_t begin) const {
    return {z + begin,
            grad + begin,
            exp_avg + begin,
            exp_avg_sq + begin,
            e ? e + begin : nullptr,
            noise ? noise + begin : nullptr};
  }
  float y(int64_t i) const { return noise ? z[i] + noise[i] : z[i]; }
};

// Numbers that the sums are relative to.
struct Centre {
  float top;   // M
  float grad;  // G[token]
  softmax::Tau tau;
};

struct Step {
  Centre centre;
  float weight;  // sqrt(1 - beta2) / (S tau)
  float mean;    // T / S, times the weight
  AdamRate adam;

  // True if the step may divide by estimates: nothing overflows, and subnormal numbers, which
  // estimates do not take, are lost beside epsilon.
  bool ordinary() const { return adam.rate >= 0x1p-30f && adam.rate <= 0x1p4f; }
};

// Sums and maxima of a chunk.
struct ChunkSums {
  double sum;                // S
  double weighted_grad_sum;  // T
  float max;                 // of y
  float second;              // largest second moment
  float token;               // y of the hard token; only of its own chunk
  bool tied;                 // whether a token before the hard token equals it; likewise
  bool nonfinite;            // whether a y is NaN or +inf
};

// Passes over the first `n` tokens of `row`, at most kChunkTokens, with noise or without.
struct ChunkPasses {
  // Largest y, and whether one is not finite.
  void (*find_max)(const Row& row, int64_t n, ChunkSums& sums);
  // S and T, and whether one is not finite; other fields of `sums` stay.
  void (*sum_exps)(const Row& row, int64_t n, const Centre& centre, ChunkSums& sums);
  // A step. token: the hard token's index in the chunk, outside of [0, n) if it is elsewhere;
  // prefetch: elements from this chunk to the next one.
  void (*take_step)(const Row& row, int64_t n, const Step& step, int64_t token, int64_t prefetch,
                    ChunkSums& sums);

  ChunkPasses(bool noise, nabla_fast_isa isa);
};

// noise[n] of the tokens from `token` on.
void draw_noise(int64_t seed, int64_t position, int64_t token, int64_t n, float* noise);

}  // namespace nabla_fast::descent

#endif  // NABLA_FAST_CPU_OPS_DTO_DESCENT_CHUNKS_H_
