// Gumbel noise as nabla_fast.ops.gumbel_noise defines it: a function of seed, position and token.
#ifndef NABLA_FAST_CPU_GUMBEL_H_
#define NABLA_FAST_CPU_GUMBEL_H_

#include <cstdint>

#include "isa.h"

namespace nabla_fast::cpu {

// Philox-4x32-10 (Salmon et al., SC'11): four words from a counter and a key.
NABLA_FAST_INLINE void philox_4x32_10(uint32_t counter[4], uint32_t key0, uint32_t key1) {
  for (int round = 0; round < 10; ++round) {
    const uint64_t product0 = uint64_t{0xD2511F53u} * counter[0];
    const uint64_t product1 = uint64_t{0xCD9E8D57u} * counter[2];
    counter[0] = static_cast<uint32_t>(product1 >> 32) ^ counter[1] ^ key0;
    counter[2] = static_cast<uint32_t>(product0 >> 32) ^ counter[3] ^ key1;
    counter[1] = static_cast<uint32_t>(product1);
    counter[3] = static_cast<uint32_t>(product0);
    key0 += 0x9E3779B9u;
    key1 += 0xBB67AE85u;
  }
}

template <int W>
struct WideTypes {
  typedef double Doubles __attribute__((vector_size(8 * W)));
  typedef int64_t Longs __attribute__((vector_size(8 * W)));
};

// log(x) of normal positive numbers, within 2 ulp.
template <int W>
NABLA_FAST_INLINE typename WideTypes<W>::Doubles vec_log(typename WideTypes<W>::Doubles x) {
  using Doubles = typename WideTypes<W>::Doubles;
  using Longs = typename WideTypes<W>::Longs;
  // x = 2^n m with m in [sqrt(1/2), sqrt(2)), so that n is 0 and nothing cancels around 1.
  const int64_t root_half = 0x3FE6A09E667F3BCD, exponent_of_one = int64_t{1023} << 52;
  const Longs above = (Longs)x - root_half + exponent_of_one;
  const Longs n = (above >> 52) - 1023;
  const Doubles m = (Doubles)((Longs)x - (n << 52));
  // log(m) = 2 artanh(s)
  const Doubles f = m - 1.0;
  const Doubles s = f / (2.0 + f);
  const Doubles z = s * s;
  Doubles q = z * (1.0 / 21) + 1.0 / 19;
  q = q * z + 1.0 / 17;
  q = q * z + 1.0 / 15;
  q = q * z + 1.0 / 13;
  q = q * z + 1.0 / 11;
  q = q * z + 1.0 / 9;
  q = q * z + 1.0 / 7;
  q = q * z + 1.0 / 5;
  q = q * z + 1.0 / 3;
  const Doubles log_m = 2.0 * s + 2.0 * s * z * q;
  return __builtin_convertvector(n, Doubles) * 0.6931471805599453 + log_m;
}

// noise: [n] of the tokens from `token` on, a multiple of 4, under one seed at one position.
template <int W>
NABLA_FAST_INLINE void gumbel_noise(int64_t seed, int64_t position, int64_t token, int64_t n,
                                    float* noise) {
  using Doubles = typename WideTypes<W>::Doubles;
  for (int64_t begin = 0; begin < n; begin += 8) {
    double uniform[8];
    for (int64_t half = 0; half < 2; ++half) {
      uint32_t words[4] = {static_cast<uint32_t>((token + begin) / 4 + half),
                           static_cast<uint32_t>(position), static_cast<uint32_t>(position >> 32),
                           0};
      philox_4x32_10(words, static_cast<uint32_t>(seed), static_cast<uint32_t>(seed >> 32));
      for (int i = 0; i < 4; ++i) {
        uniform[4 * half + i] = (static_cast<int32_t>(words[i] >> 9) + 0.5) * 0x1p-23;
      }
    }
    for (int64_t part = 0; part < 8; part += W) {
      Doubles u;
      __builtin_memcpy(&u, uniform + part, sizeof u);
      const Doubles g = -vec_log<W>(-vec_log<W>(u));
      for (int64_t i = 0; i < W && begin + part + i < n; ++i) {
        noise[begin + part + i] = static_cast<float>(g[i]);
      }
    }
  }
}

}  // namespace nabla_fast::cpu

#endif  // NABLA_FAST_CPU_GUMBEL_H_
