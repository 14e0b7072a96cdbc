// products() and pack_rows().
//
// Many rows: rows lie in the vectors' lanes, and every element of a tile of the table, copied into
// the first-level cache, is broadcast to a vector once. Few rows: chains lie in the lanes, and a
// table is read by vectors, from memory as fast as any loop reads it. An element's multiply-adds are
// the same ones in the same order either way.
//
// A word is a float, a bf16 converted to one, or, where both sides are bf16 and the CPU has their dot
// product, a pair of bf16.

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <type_traits>

#include "base/isa.h"
#include "base/prefetch.h"
#include "gemm/amx.h"
#include "gemm/vocab_tiles.h"
#include "simd/bf16.h"
#include "simd/bf16_dot.h"
#include "simd/vec.h"

namespace nabla_fast::gemm {
namespace {

// Words of a row whose chains are summed side by side: word k belongs to chain k % chains. Of a longer
// chain the error would grow, with the square root of its length; of a longer block the tiles.
constexpr int64_t kBlockWords = 256;
// Rows up to which chains lie in the lanes: sixteen lanes of rows are faster where five have one.
constexpr int kMaxFewRows = 4;
// Bytes of a table that are multiplied while those behind them are prefetched: both stay in the
// second-level cache.
constexpr int64_t kBytesInL2 = 256 << 10;
// Tokens of a tile, a block of words of each.
template <int W>
constexpr int kTileTokens = W == 8 ? 12 : 16;
// Tokens side by side where rows are few, as many streams as the hardware's prefetcher follows well,
// and behind the last whole group of tokens where they are many.
constexpr int kFewTokens = 4;
// Bytes from the tokens at work to those being prefetched where rows are few, at least.
constexpr int64_t kFewPrefetchBytes = 8192;

template <int W>
using Bits = typename VecTypes<W>::Bits;

// -- a word ---------------------------------------------------------------------------------------

constexpr int kFp32Chains = 8, kPairChains = 16;

// A float32 on both sides.
template <int W>
struct Fp32Word {
  using Vector = Floats<W>;
  static constexpr int kChains = kFp32Chains;
  static NABLA_FAST_INLINE Vector broadcast(const float* word) {
    return nabla_fast::broadcast<W>(*word);
  }
  static NABLA_FAST_INLINE Vector load(const float* words) { return nabla_fast::load<W>(words); }
  static NABLA_FAST_INLINE void add(Floats<W>& total, Vector a, Vector b) { total += a * b; }
};

#if NABLA_FAST_BF16_DOT
// Two bf16 on both sides.
struct PairWord {
  using Vector = Bits<16>;
  static constexpr int kChains = kPairChains;
  static NABLA_FAST_INLINE Vector broadcast(const float* word) {
    return (Vector)nabla_fast::broadcast<16>(*word);
  }
  static NABLA_FAST_INLINE Vector load(const float* words) {
    return (Vector)nabla_fast::load<16>(words);
  }
  static NABLA_FAST_INLINE void add(Floats<16>& total, Vector a, Vector b) {
    add_bf16_dot(total, a, b);
  }
};
#endif

// Terms of the chains before chain `chain` of a block of `words` words, where one chain lies behind
// the other.
constexpr int64_t chain_start(int64_t words, int chains, int64_t chain) {
  return chain * (words / chains) + std::min<int64_t>(chain, words % chains);
}

// -- many rows ------------------------------------------------------------------------------------

// Words between two prefetches of whole lines, of so many tokens' bytes a word.
constexpr int words_per_prefetch(int bytes) {
  return 4 * bytes % 64 == 0 ? 4 : 8 * bytes % 64 == 0 ? 8 : 16;
}

// `kTokens` tokens of a tile, a word of each, with `C` vectors of rows.
template <int C, int kTokens, int W, typename Word>
NABLA_FAST_INLINE void add_word(const float* w, int64_t stride, const float* x,
                                Floats<W> (&total)[kTokens * C]) {
  typename Word::Vector row[C];
#pragma GCC unroll 4
  for (int c = 0; c < C; ++c) row[c] = Word::load(x + c * W);
#pragma GCC unroll 16
  for (int t = 0; t < kTokens; ++t) {
    const typename Word::Vector word = Word::broadcast(w + t * stride);
#pragma GCC unroll 4
    for (int c = 0; c < C; ++c) Word::add(total[t * C + c], word, row[c]);
  }
}

// A chain of `terms` words of each token, with x [terms, lanes]; `kBytes`: those of a word in memory.
template <int W, int C, int kTokens, int kBytes, typename Word>
NABLA_FAST_INLINE void chain(const float* w, int64_t stride, const float* x, int lanes,
                             int64_t terms, bool add, float* z, Prefetcher& prefetcher) {
  constexpr int kTerms = words_per_prefetch(kTokens * kBytes);
  Floats<W> total[kTokens * C] = {};
  int64_t n = 0;
  for (; n + kTerms <= terms; n += kTerms) {
    prefetcher.advance<kTerms * kTokens * kBytes>();
#pragma GCC unroll 16
    for (int u = 0; u < kTerms; ++u)
      add_word<C, kTokens, W, Word>(w + (n + u) * Word::kChains, stride, x + (n + u) * lanes,
                                    total);
  }
  for (; n < terms; ++n)
    add_word<C, kTokens, W, Word>(w + n * Word::kChains, stride, x + n * lanes, total);
#pragma GCC unroll 16
  for (int t = 0; t < kTokens; ++t) {
#pragma GCC unroll 4
    for (int c = 0; c < C; ++c) {
      float* out = z + t * lanes + c * W;
      store<W>(out, add ? load<W>(out) + total[t * C + c] : total[t * C + c]);
    }
  }
}

// A chain of all tokens of a tile. kTokens: how many share the loads of the rows.
template <int W, int C, int kTokens, int kBytes, typename Word>
NABLA_FAST_INLINE void chain_of_tile(const float* w, int64_t stride, int tokens, const float* x,
                                     int lanes, int64_t terms, bool add, float* z,
                                     Prefetcher& prefetcher) {
  int t = 0;
  for (; t + kTokens <= tokens; t += kTokens)
    chain<W, C, kTokens, kBytes, Word>(w + t * stride, stride, x, lanes, terms, add, z + t * lanes,
                                       prefetcher);
  for (; t + kFewTokens <= tokens; t += kFewTokens)
    chain<W, C, kFewTokens, kBytes, Word>(w + t * stride, stride, x, lanes, terms, add,
                                          z + t * lanes, prefetcher);
  for (; t < tokens; ++t)
    chain<W, C, 1, kBytes, Word>(w + t * stride, stride, x, lanes, terms, add, z + t * lanes,
                                 prefetcher);
}

// chain_of_tile() for all lanes.
template <int W, int kBytes, typename Word>
NABLA_FAST_INLINE void all_lanes(const float* w, int64_t stride, int tokens, const float* x,
                                 int lanes, int64_t terms, bool add, float* z,
                                 Prefetcher& prefetcher) {
  if constexpr (W == 16) {
    // C * kTokens sums: as many as the registers hold.
    if (lanes == 16)
      chain_of_tile<W, 1, 16, kBytes, Word>(w, stride, tokens, x, lanes, terms, add, z, prefetcher);
    else if (lanes == 32)
      chain_of_tile<W, 2, 8, kBytes, Word>(w, stride, tokens, x, lanes, terms, add, z, prefetcher);
    else if (lanes == 48)
      chain_of_tile<W, 3, 6, kBytes, Word>(w, stride, tokens, x, lanes, terms, add, z, prefetcher);
    else
      chain_of_tile<W, 4, 4, kBytes, Word>(w, stride, tokens, x, lanes, terms, add, z, prefetcher);
  } else {
    // Of AVX2's 16 registers twelve are sums, four more than two multiply-adds a cycle wait for.
    constexpr int kTokens = W == 8 ? 6 : 4;
    Prefetcher none{prefetcher.next};
    for (int lane = 0; lane < lanes; lane += 2 * W)
      chain_of_tile<W, 2, kTokens, kBytes, Word>(w, stride, tokens, x + lane, lanes, terms, add,
                                                 z + lane, lane == 0 ? prefetcher : none);
  }
}

template <int W, typename T>
NABLA_FAST_INLINE void copy_words(const char* from, int64_t words, float* to) {
  if constexpr (sizeof(T) == 2)
    nabla_fast::copy_to_fp32<W>(reinterpret_cast<const uint16_t*>(from), words, to);
  else
    std::memcpy(to, from, sizeof(float) * static_cast<size_t>(words));
}

// T: float, uint16_t for a bf16 that is converted, uint32_t for a pair, at any address.
template <int W, typename T, typename Word>
NABLA_FAST_INLINE void many_rows(const PackedRows& rows, const Table& table, int64_t words,
                                 int tokens, bool add, float* z) {
  const auto* x = static_cast<const float*>(rows.data);
  const auto* data = static_cast<const char*>(table.data);
  const int lanes = rows.lanes();
  const int64_t row_bytes = table.stride * table.bytes();
  if (words == 0 && add) return;  // a sum that is -0 stays
  const int in_l2 = static_cast<int>(std::clamp<int64_t>(
      kBytesInL2 / (table.width * table.bytes() + 1) / 16 * 16, 16, kVocabTileTokens));
  // Rows that lie 4 KiB apart would drive each other out of the first-level cache.
  const bool copies = words > 0 && (!std::is_same_v<T, float> || row_bytes % 4096 == 0);
  alignas(64) float tile[kTileTokens<W> * kBlockWords];
  for (int first = 0; first < tokens; first += in_l2) {
    const int end = std::min(first + in_l2, tokens);
    Prefetcher prefetcher{data + end * row_bytes};
    for (int64_t k = 0; k < words || k == 0; k += kBlockWords) {
      const int64_t block = std::min(kBlockWords, words - k);
      for (int t = first; t < end; t += kTileTokens<W>) {
        const int some = std::min(kTileTokens<W>, end - t);
        const char* const from = data + t * row_bytes + k * static_cast<int>(sizeof(T));
        for (int n = 0; copies && n < some; ++n)
          copy_words<W, T>(from + n * row_bytes, block, tile + n * kBlockWords);
        const auto* const w = copies ? tile : reinterpret_cast<const float*>(from);
        for (int c = 0; c == 0 || c < std::min<int64_t>(block, Word::kChains); ++c) {
          const int64_t start = chain_start(block, Word::kChains, c);
          all_lanes<W, sizeof(T), Word>(w + c, copies ? kBlockWords : table.stride, some,
                                        x + (k + start) * lanes, lanes,
                                        chain_start(block, Word::kChains, c + 1) - start,
                                        add || k > 0 || c > 0, z + t * lanes, prefetcher);
        }
      }
    }
  }
}

// -- few rows -------------------------------------------------------------------------------------

constexpr int padded_few_rows(int rows) { return rows <= 2 ? rows : kMaxFewRows; }

template <int W, typename T, typename Word>
NABLA_FAST_INLINE typename Word::Vector load_words(const char* from) {
  if constexpr (sizeof(T) == 2) {
    return load_fp32<W>(reinterpret_cast<const uint16_t*>(from));
  } else {
    typedef uint32_t Words __attribute__((vector_size(4 * W), aligned(2), may_alias));
    return (typename Word::Vector)(Bits<W>)*reinterpret_cast<const Words*>(from);
  }
}

// total[(r * kFewTokens + t) * P + p] += the products of word k of each chain.
template <int W, int R, int P, typename T, typename Word>
NABLA_FAST_INLINE void add_words(const char* const (&w)[kFewTokens], const float* x,
                                 int64_t x_words, int64_t k, Floats<W>* total) {
#pragma GCC unroll 2
  for (int p = 0; p < P; ++p) {
    typename Word::Vector row[R];
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) row[r] = Word::load(x + r * x_words + k + p * W);
#pragma GCC unroll 4
    for (int t = 0; t < kFewTokens; ++t) {
      auto words = load_words<W, T, Word>(w[t] + (k + p * W) * static_cast<int>(sizeof(T)));
      keep_in_register<W>(words);
#pragma GCC unroll 4
      for (int r = 0; r < R; ++r) Word::add(total[(r * kFewTokens + t) * P + p], words, row[r]);
    }
  }
}

// sums[r][t] += the chains of a block of words of `R` rows and four tokens, in order.
template <int W, int R, bool kPrefetch, typename T, typename Word>
NABLA_FAST_INLINE void add_block(const char* const (&w)[kFewTokens], const float* x,
                                 int64_t x_words, int64_t words, int64_t ahead,
                                 float (*sums)[kFewTokens]) {
  constexpr int kChains = Word::kChains, P = kChains / W;
  constexpr int kLine = std::max<int>(64 / sizeof(T), kChains);
  Floats<W> total[R * kFewTokens * P] = {};
  int64_t k = 0;
  for (; k + kLine <= words; k += kLine) {
#pragma GCC unroll 4
    for (int n = 0; n < kLine; n += kChains)
      add_words<W, R, P, T, Word>(w, x, x_words, k + n, total);
    if (kPrefetch) {
      // An address, not an access: behind the table's end it does nothing.
#pragma GCC unroll 4
      for (int t = 0; t < kFewTokens; ++t)
        __builtin_prefetch(w[t] + k * static_cast<int>(sizeof(T)) + ahead);
    }
  }
  for (; k + kChains <= words; k += kChains) add_words<W, R, P, T, Word>(w, x, x_words, k, total);
  if (k < words) {
    char ends[kFewTokens][kChains * sizeof(T)] = {};
    const char* end[kFewTokens];
    for (int t = 0; t < kFewTokens; ++t) {
      std::memcpy(ends[t], w[t] + k * static_cast<int>(sizeof(T)),
                  static_cast<size_t>(words - k) * sizeof(T));
      end[t] = ends[t];
    }
    add_words<W, R, P, T, Word>(end, x + k, x_words, 0, total);
  }
  const int chains = static_cast<int>(std::min<int64_t>(words, kChains));
#pragma GCC unroll 4
  for (int r = 0; r < R; ++r) {
    float chain[kFewTokens][kChains];
#pragma GCC unroll 8
    for (int n = 0; n < kFewTokens * P; ++n)
      store<W>(&chain[0][0] + n * W, total[r * kFewTokens * P + n]);
    for (int c = 0; c < chains; ++c)
      for (int t = 0; t < kFewTokens; ++t) sums[r][t] += chain[t][c];
  }
}

// x: [kRows, x_words], of which kTogether rows are in registers at once.
template <int W, int kRows, int kTogether, typename T, typename Word>
NABLA_FAST_INLINE void chains_in_lanes(const float* x, int64_t x_words, int lanes,
                                       const Table& table, int64_t words, int tokens, bool add,
                                       float* z) {
  constexpr int kAtOnce = std::min(kRows, kTogether);
  const int64_t row_bytes = table.stride * table.bytes();
  const int64_t group_bytes = kFewTokens * table.width * table.bytes();
  const int64_t ahead = (kFewPrefetchBytes / (group_bytes + 1) + 1) * kFewTokens * row_bytes;
  for (int first = 0; first < tokens; first += kFewTokens) {
    const int some = std::min(kFewTokens, tokens - first);
    // Added to -0, the first chain keeps the sign that it has as 0.
    const float none = words > 0 ? -0.0f : 0.0f;
    float sums[kRows][kFewTokens];
    for (int r = 0; r < kRows; ++r)
      for (int t = 0; t < kFewTokens; ++t)
        sums[r][t] = add && t < some ? z[(first + t) * lanes + r] : none;
    for (int64_t k = 0; k < words; k += kBlockWords) {
      const int64_t block = std::min(kBlockWords, words - k);
      const char* w[kFewTokens];
      // Where tokens end, the last one is repeated.
      for (int t = 0; t < kFewTokens; ++t)
        w[t] = static_cast<const char*>(table.data) + (first + std::min(t, some - 1)) * row_bytes +
               k * static_cast<int>(sizeof(T));
      add_block<W, kAtOnce, true, T, Word>(w, x + k, x_words, block, ahead, sums);
      for (int r = kAtOnce; r < kRows; r += kAtOnce)
        add_block<W, kAtOnce, false, T, Word>(w, x + r * x_words + k, x_words, block, 0, sums + r);
    }
    for (int r = 0; r < kRows; ++r)
      for (int t = 0; t < some; ++t) z[(first + t) * lanes + r] = sums[r][t];
  }
}

template <int W, int kTogether, typename T, typename Word>
NABLA_FAST_INLINE void few_rows(const PackedRows& rows, const Table& table, int64_t words,
                                int tokens, bool add, float* z) {
  const auto* x = static_cast<const float*>(rows.data);
  const int lanes = rows.lanes();
  const int64_t x_words = padded(rows.columns());
  if (!add) std::fill_n(z, tokens * lanes, 0.0f);
  switch (padded_few_rows(rows.rows)) {
    case 1:
      return chains_in_lanes<W, 1, kTogether, T, Word>(x, x_words, lanes, table, words, tokens, add,
                                                       z);
    case 2:
      return chains_in_lanes<W, 2, kTogether, T, Word>(x, x_words, lanes, table, words, tokens, add,
                                                       z);
    default:
      return chains_in_lanes<W, kMaxFewRows, kTogether, T, Word>(x, x_words, lanes, table, words,
                                                                 tokens, add, z);
  }
}

// -- both -----------------------------------------------------------------------------------------

template <int W, typename T>
NABLA_FAST_INLINE void product_tile(const PackedRows& rows, const Table& table, int tokens,
                                    bool add, float* z) {
  // Chains are 8: a vector of 16 lanes would have two tokens'.
  constexpr int kFewW = std::min(W, 8), kTogether = W == 16 ? 4 : W == 8 ? 2 : 1;
  if (rows.rows <= kMaxFewRows)
    few_rows<kFewW, kTogether, T, Fp32Word<kFewW>>(rows, table, table.width, tokens, add, z);
  else
    many_rows<W, T, Fp32Word<W>>(rows, table, table.width, tokens, add, z);
}

NABLA_FAST_FOR_EACH_ISA(fp32_tile, product_tile<W, float>)
NABLA_FAST_FOR_EACH_ISA(bf16_tile, product_tile<W, uint16_t>)

#if NABLA_FAST_BF16_DOT
NABLA_FAST_TARGET_AVX512 void pair_tile(const PackedRows& rows, const Table& table, int tokens,
                                        bool add, float* z) {
  const auto* x = static_cast<const float*>(rows.data);
  const auto* w = static_cast<const uint16_t*>(table.data);
  const int lanes = rows.lanes();
  const int64_t whole = table.width / 2;
  const bool few = rows.rows <= kMaxFewRows;
  if (few)
    few_rows<16, 4, uint32_t, PairWord>(rows, table, whole, tokens, add, z);
  else
    many_rows<16, uint32_t, PairWord>(rows, table, whole, tokens, add, z);
  if (table.width % 2 == 0) return;
  // The last column has no other half: the next element in memory is not the row's.
  const float* last_x = x + whole * lanes;
  float last_of_few[16] = {};
  if (few) {
    std::copy_n(x + padded_few_rows(rows.rows) * padded(rows.columns()), rows.rows, last_of_few);
    last_x = last_of_few;
  }
  for (int t = 0; t < tokens; ++t) {
    const Bits<16> word = Bits<16>{} + w[t * table.stride + table.width - 1];
    for (int lane = 0; lane < lanes; lane += 16) {
      Floats<16> product = {};
      PairWord::add(product, word, PairWord::load(last_x + lane));
      float* const out = z + t * lanes + lane;
      store<16>(out, load<16>(out) + product);
    }
  }
}
#endif

// -- rows -----------------------------------------------------------------------------------------

// Where word k of a row of `words` lies among those of many rows.
template <int kChains>
constexpr int64_t place_of_word(int64_t k, int64_t words) {
  const int64_t in_block = k % kBlockWords, block = k - in_block;
  return block + in_block / kChains +
         chain_start(std::min(kBlockWords, words - block), kChains, in_block % kChains);
}

template <int W>
NABLA_FAST_INLINE void pack_floats(const Table& from, int rows, int lanes, float* packed) {
  float fp32[W][W];
  for (int r = 0; r < lanes; r += W) {
    for (int64_t k = 0; k < from.width; k += W) {
      const int64_t columns = std::min<int64_t>(W, from.width - k);
      for (int n = 0; n < W; ++n) {
        float padded_row[16] = {};
        if (r + n < rows) copy_to_fp32<W>(from, r + n, k, columns, padded_row);
        std::memcpy(fp32[n], padded_row, sizeof fp32[n]);
      }
      Floats<W> x[W];
      for (int n = 0; n < W; ++n) x[n] = load<W>(fp32[n]);
      transpose<W>(x);
      for (int64_t n = 0; n < columns; ++n)
        store<W>(packed + place_of_word<kFp32Chains>(k + n, from.width) * lanes + r, x[n]);
    }
  }
}

NABLA_FAST_FOR_EACH_ISA(pack_fp32, pack_floats<W>)

float bf16_pair(uint16_t lower, uint16_t upper) {
  const uint16_t halves[2] = {lower, upper};
  float word;
  std::memcpy(&word, halves, sizeof word);
  return word;
}

// A pair of bf16 columns of a row, as a word; 0 behind the last column.
float pair_of(const Table& from, int row, int64_t pair) {
  const uint16_t* const data =
      static_cast<const uint16_t*>(from.data) + row * from.stride + 2 * pair;
  return bf16_pair(data[0], 2 * pair + 1 < from.width ? data[1] : uint16_t{0});
}

// Behind whole pairs the last column, where it is half of one.
void pack_pairs(const Table& from, int rows, int lanes, float* packed) {
  const int64_t whole = from.width / 2;
  for (int64_t pair = 0; pair < (from.width + 1) / 2; ++pair) {
    const int64_t place = pair < whole ? place_of_word<kPairChains>(pair, whole) : whole;
    for (int r = 0; r < lanes; ++r)
      packed[place * lanes + r] = r < rows ? pair_of(from, r, pair) : 0.0f;
  }
}

// As few_rows() reads them, row by row; behind the rows their last columns where these are halves of
// pairs.
void pack_few(const Table& from, int rows, bool pairs, float* packed) {
  const int64_t words = pairs ? from.width / 2 : from.width;
  const int64_t row_words = padded(PackedRows{nullptr, rows, from.width, pairs, 0}.columns());
  float* const behind = packed + padded_few_rows(rows) * row_words;
  // Products of -0 with zeros are -0, which leaves a sum as it is, also one that is -0.
  std::fill(packed, behind, pairs ? bf16_pair(0x8000, 0x8000) : -0.0f);
  for (int r = 0; r < rows; ++r) {
    for (int64_t k = 0; k < words; ++k)
      packed[r * row_words + k] = pairs ? pair_of(from, r, k) : from.value(r, k);
    if (pairs && from.width % 2) behind[r] = pair_of(from, r, words);
  }
}

}  // namespace

PackedRows pack_rows(const Table& from, int rows, nabla_fast_dtype table_dtype, void* memory) {
  if (table_dtype == NABLA_FAST_BFLOAT16 && nabla_fast_cpu_isa() >= NABLA_FAST_ISA_AMX)
    return pack_amx(from, rows, memory);
  const bool both = from.dtype == NABLA_FAST_BFLOAT16 && table_dtype == NABLA_FAST_BFLOAT16;
  const bool pairs = both && nabla_fast_cpu_isa() >= NABLA_FAST_ISA_AVX512_BF16;
  const int lanes = lanes_of(rows);
  auto* const packed = static_cast<float*>(memory);
  if (rows <= kMaxFewRows)
    pack_few(from, rows, pairs, packed);
  else if (pairs)
    pack_pairs(from, rows, lanes, packed);
  else
    pack_fp32(from, rows, lanes, packed);
  return {memory, rows, from.width, pairs, 0};
}

void products(const PackedRows& rows, const Table& table, int tokens, bool add, float* z) {
  if (rows.terms) return products_amx(rows, table, tokens, add, z);
#if NABLA_FAST_BF16_DOT
  if (rows.pairs) return pair_tile(rows, table, tokens, add, z);
#endif
  const bool floats = table.dtype == NABLA_FAST_FLOAT32;
  (floats ? fp32_tile : bf16_tile)(rows, table, tokens, add, z);
}

}  // namespace nabla_fast::gemm
