// Gumbel noise as nabla_fast.ops.gumbel_noise defines it: a function of seed, position and token.
#ifndef NABLA_FAST_CPU_SIMD_GUMBEL_H_
#define NABLA_FAST_CPU_SIMD_GUMBEL_H_

#include <cstdint>

#include "base/isa.h"

namespace nabla_fast {

template <int W>
struct WideTypes {
  typedef double Doubles __attribute__((vector_size(8 * W)));
  typedef int64_t Longs __attribute__((vector_size(8 * W)));
  typedef uint64_t Words __attribute__((vector_size(8 * W)));
};

// Philox-4x32-10 (Salmon et al., SC'11): four words from a counter and a key, in every lane; 32-bit
// words stand in 64 bits, where their products have room.
template <int W>
NABLA_FAST_INLINE void philox_4x32_10(typename WideTypes<W>::Words counter[4], uint32_t key0,
                                      uint32_t key1) {
  using Words = typename WideTypes<W>::Words;
  const uint64_t low = 0xFFFFFFFFu;
  for (int round = 0; round < 10; ++round) {
    const Words product0 = counter[0] * uint64_t{0xD2511F53u};
    const Words product1 = counter[2] * uint64_t{0xCD9E8D57u};
    counter[0] = (product1 >> 32) ^ counter[1] ^ uint64_t { key0 };
    counter[2] = (product0 >> 32) ^ counter[3] ^ uint64_t { key1 };
    counter[1] = product1 & low;
    counter[3] = product0 & low;
    key0 += 0x9E3779B9u;
    key1 += 0xBB67AE85u;
  }
}

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

// Words of 4 W tokens from `token` on, a multiple of 4, under one seed: of token + 4 lane + word. The
// counter is (token div 4, second, third, fourth).
template <int W>
NABLA_FAST_INLINE void token_words(int64_t seed, int64_t token, uint32_t second, uint32_t third,
                                   uint32_t fourth, typename WideTypes<W>::Words (&words)[4]) {
  using Words = typename WideTypes<W>::Words;
  Words lane;
  for (int i = 0; i < W; ++i) lane[i] = static_cast<uint64_t>(i);
  words[0] = lane + static_cast<uint64_t>(token / 4);
  words[1] = Words{} + second;
  words[2] = Words{} + third;
  words[3] = Words{} + fourth;
  philox_4x32_10<W>(words, static_cast<uint32_t>(seed), static_cast<uint32_t>(seed >> 32));
}

// -log(-log((number + 1/2) unit)), `unit` being 1 over how many numbers there are.
template <int W>
NABLA_FAST_INLINE typename WideTypes<W>::Doubles gumbel_of(typename WideTypes<W>::Words number,
                                                           double unit) {
  using Longs = typename WideTypes<W>::Longs;
  using Doubles = typename WideTypes<W>::Doubles;
  const Doubles wide = __builtin_convertvector((Longs)number, Doubles);
  return -vec_log<W>(-vec_log<W>((wide + 0.5) * unit));
}

// noise: [n] of the tokens from `token` on, a multiple of 4, under one seed at one position.
template <int W>
NABLA_FAST_INLINE void gumbel_noise(int64_t seed, int64_t position, int64_t token, int64_t n,
                                    float* noise) {
  // A lane has a block of 4 tokens.
  for (int64_t begin = 0; begin < n; begin += 4 * W) {
    typename WideTypes<W>::Words words[4];
    token_words<W>(seed, token + begin, static_cast<uint32_t>(position),
                   static_cast<uint32_t>(position >> 32), 0, words);
    alignas(64) float g[4][W];
    for (int word = 0; word < 4; ++word) {
      const auto wide = gumbel_of<W>(words[word] >> 9, 0x1p-23);
      for (int i = 0; i < W; ++i) g[word][i] = static_cast<float>(wide[i]);
    }
    const int64_t count = n - begin < 4 * W ? n - begin : 4 * W;
    for (int64_t i = 0; i < count; ++i) noise[begin + i] = g[i % 4][i / 4];
  }
}

}  // namespace nabla_fast

#endif  // NABLA_FAST_CPU_SIMD_GUMBEL_H_
