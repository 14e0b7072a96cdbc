// Gumbel noise as nabla_fast.ops.gumbel_noise defines it: a function of seed, position and token.
#ifndef NABLA_FAST_CUDA_GUMBEL_H_
#define NABLA_FAST_CUDA_GUMBEL_H_

#include "device.h"

namespace nabla_fast::cuda {

// Keys of rows' noise: [rows] each; null for none.
struct Noise {
  const int64_t *seed, *position;
};

// Philox-4x32-10 (Salmon et al., SC'11): four words from a counter and a key.
NABLA_FAST_DEVICE void philox_4x32_10(uint32_t (&counter)[4], uint32_t key0, uint32_t key1) {
  NABLA_FAST_UNROLL
  for (int round = 0; round < 10; ++round) {
    const uint64_t product0 = uint64_t{counter[0]} * 0xD2511F53u;
    const uint64_t product1 = uint64_t{counter[2]} * 0xCD9E8D57u;
    const uint32_t word1 = counter[1], word3 = counter[3];
    counter[0] = static_cast<uint32_t>(product1 >> 32) ^ word1 ^ key0;
    counter[1] = static_cast<uint32_t>(product1);
    counter[2] = static_cast<uint32_t>(product0 >> 32) ^ word3 ^ key1;
    counter[3] = static_cast<uint32_t>(product0);
    key0 += 0x9E3779B9u;
    key1 += 0xBB67AE85u;
  }
}

// Noise of four tokens from `token` on, a multiple of 4. In double: near its zero at u = 1/e the
// outer logarithm magnifies the rounding of the inner one.
NABLA_FAST_DEVICE Four<float> gumbel_four(int64_t seed, int64_t position, int64_t token) {
  uint32_t words[4] = {static_cast<uint32_t>(token / 4), static_cast<uint32_t>(position),
                       static_cast<uint32_t>(position >> 32), 0};
  philox_4x32_10(words, static_cast<uint32_t>(seed), static_cast<uint32_t>(seed >> 32));
  Four<float> noise;
  NABLA_FAST_UNROLL
  for (int n = 0; n < 4; ++n) {
    const double uniform = ((words[n] >> 9) + 0.5) * 0x1p-23;
    noise.of[n] = static_cast<float>(-log(-log(uniform)));
  }
  return noise;
}

}  // namespace nabla_fast::cuda

#endif  // NABLA_FAST_CUDA_GUMBEL_H_
