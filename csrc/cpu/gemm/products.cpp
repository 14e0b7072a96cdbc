// products() and pack_rows().
//
// Many rows: rows lie in the vectors' lanes, and every element of the table is broadcast to a
// vector once; the table is read as it is. Few rows: tokens and chains of columns lie in the lanes,
// squares of them and of a chain's columns being transposed in registers. An element's multiply-adds
// are the same ones in the same order either way.
//
// A column is a float, a bf16 converted to one, or, where both sides are bf16 and the CPU has their
// dot product, a pair of bf16.

#include <algorithm>
#include <cstdint>
#include <cstring>

#include "base/isa.h"
#include "base/prefetch.h"
#include "gemm/amx.h"
#include "gemm/vocab_tiles.h"
#include "simd/bf16.h"
#include "simd/bf16_dot.h"
#include "simd/vec.h"

namespace nabla_fast::gemm {
namespace {

// Columns of one chain: a longer one is faster and less accurate, its error growing with the square
// root of its length.
constexpr int64_t kChainColumns = 32;
// Rows up to which tokens lie in the lanes: sixteen lanes of rows are faster where five have one.
constexpr int kMaxFewRows = 4;
// Bytes of a table that are multiplied while those behind them are prefetched: both stay in the
// second-level cache.
constexpr int64_t kBlockBytes = 256 << 10;
// Tokens that several vectors of rows pass over, or that are converted, one chain's columns at a
// time.
template <int W>
constexpr int kTokensInL1 = W == 8 ? 24 : 16;
// Tokens side by side where rows are few, as many streams as the hardware's prefetcher follows well,
// and behind the last whole group of tokens where they are many.
constexpr int kFewTokens = 4;
// Columns between two prefetches of whole lines, of so many tokens' bytes a column.
constexpr int columns_per_prefetch(int bytes) { return 4 * bytes % 64 == 0 ? 4 : 8; }

template <int W>
using Bits = typename VecTypes<W>::Bits;

// -- a column -------------------------------------------------------------------------------------

// A float32 on both sides.
template <int W>
struct Fp32Column {
  using Element = float;
  using Vector = Floats<W>;
  static constexpr int kElements = 1;
  static NABLA_FAST_INLINE Vector broadcast(const float* element) {
    return nabla_fast::broadcast<W>(*element);
  }
  static NABLA_FAST_INLINE Vector load(const float* x) { return nabla_fast::load<W>(x); }
  static NABLA_FAST_INLINE void add(Floats<W>& total, Vector a, Vector b) { total += a * b; }
};

#if NABLA_FAST_BF16_DOT
// Two bf16 on both sides.
struct Bf16PairColumn {
  using Element = uint16_t;
  using Vector = Bits<16>;
  static constexpr int kElements = 2;
  static NABLA_FAST_INLINE Vector broadcast(const uint16_t* pair) { return broadcast_pair(pair); }
  static NABLA_FAST_INLINE Vector load(const float* x) { return (Vector)nabla_fast::load<16>(x); }
  static NABLA_FAST_INLINE void add(Floats<16>& total, Vector a, Vector b) {
    add_bf16_dot(total, a, b);
  }
};
#endif

// -- many rows ------------------------------------------------------------------------------------

// `kTokens` tokens, `stride` elements apart, with `C` vectors of rows, over some columns.
template <int C, int kTokens, int W, typename Column>
NABLA_FAST_INLINE void add_column(const typename Column::Element* w, int64_t stride, const float* x,
                                  Floats<W> (&total)[kTokens * C]) {
  typename Column::Vector row[C];
#pragma GCC unroll 4
  for (int c = 0; c < C; ++c) row[c] = Column::load(x + c * W);
#pragma GCC unroll 16
  for (int t = 0; t < kTokens; ++t) {
    const typename Column::Vector element = Column::broadcast(w + t * stride);
#pragma GCC unroll 4
    for (int c = 0; c < C; ++c) Column::add(total[t * C + c], element, row[c]);
  }
}

template <int W, int C, int kTokens, typename Column>
NABLA_FAST_INLINE void chain(const typename Column::Element* w, int64_t stride, const float* x,
                             int lanes, int64_t columns, bool add, float* z,
                             Prefetcher& prefetcher) {
  constexpr int kElements = Column::kElements, kBytes = kTokens * kElements * sizeof(*w);
  constexpr int kColumns = columns_per_prefetch(kBytes);
  Floats<W> total[kTokens * C] = {};
  int64_t k = 0;
  for (; k + kColumns <= columns; k += kColumns) {
    prefetcher.advance<kColumns * kBytes>();
#pragma GCC unroll 8
    for (int u = 0; u < kColumns; ++u)
      add_column<C, kTokens, W, Column>(w + (k + u) * kElements, stride, x + (k + u) * lanes,
                                        total);
  }
  for (; k < columns; ++k)
    add_column<C, kTokens, W, Column>(w + k * kElements, stride, x + k * lanes, total);
#pragma GCC unroll 16
  for (int t = 0; t < kTokens; ++t) {
#pragma GCC unroll 4
    for (int c = 0; c < C; ++c) {
      float* out = z + t * lanes + c * W;
      store<W>(out, add ? load<W>(out) + total[t * C + c] : total[t * C + c]);
    }
  }
}

// `tokens` tokens over one chain of columns, at most kChainColumns of them. kTokens: how many share
// the loads of the rows.
template <int W, int C, int kTokens, typename Column>
NABLA_FAST_INLINE void chains(const typename Column::Element* w, int64_t stride, int tokens,
                              const float* x, int lanes, int64_t columns, bool add, float* z,
                              Prefetcher& prefetcher) {
  int t = 0;
  for (; t + kTokens <= tokens; t += kTokens)
    chain<W, C, kTokens, Column>(w + t * stride, stride, x, lanes, columns, add, z + t * lanes,
                                 prefetcher);
  for (; t + kFewTokens <= tokens; t += kFewTokens)
    chain<W, C, kFewTokens, Column>(w + t * stride, stride, x, lanes, columns, add, z + t * lanes,
                                    prefetcher);
  for (; t < tokens; ++t)
    chain<W, C, 1, Column>(w + t * stride, stride, x, lanes, columns, add, z + t * lanes,
                           prefetcher);
}

// chains() for all lanes.
template <int W, typename Column>
NABLA_FAST_INLINE void all_lanes(const typename Column::Element* w, int64_t stride, int tokens,
                                 const float* x, int lanes, int64_t columns, bool add, float* z,
                                 Prefetcher& prefetcher) {
  if constexpr (W == 16) {
    // C * kTokens sums: as many as the registers hold.
    if (lanes == 16)
      chains<W, 1, 16, Column>(w, stride, tokens, x, lanes, columns, add, z, prefetcher);
    else if (lanes == 32)
      chains<W, 2, 8, Column>(w, stride, tokens, x, lanes, columns, add, z, prefetcher);
    else if (lanes == 48)
      chains<W, 3, 6, Column>(w, stride, tokens, x, lanes, columns, add, z, prefetcher);
    else
      chains<W, 4, 4, Column>(w, stride, tokens, x, lanes, columns, add, z, prefetcher);
  } else {
    // Of AVX2's 16 registers twelve are sums, four more than two multiply-adds a cycle wait for.
    constexpr int kTokens = W == 8 ? 6 : 4;
    for (int t = 0; t < tokens; t += kTokensInL1<W>) {
      const int some = std::min(kTokensInL1<W>, tokens - t);
      Prefetcher none{prefetcher.next};
      for (int lane = 0; lane < lanes; lane += 2 * W)
        chains<W, 2, kTokens, Column>(w + t * stride, stride, some, x + lane, lanes, columns, add,
                                      z + t * lanes + lane, lane == 0 ? prefetcher : none);
    }
  }
}

template <int W, typename T>
NABLA_FAST_INLINE void many_rows(const PackedRows& rows, const Table& table, int tokens, bool add,
                                 float* z) {
  const auto* x = static_cast<const float*>(rows.data);
  const auto* w = static_cast<const T*>(table.data);
  const int lanes = rows.lanes();
  const int64_t width = table.width, stride = table.stride, token_bytes = sizeof(T) * width;
  if (width == 0 && add) return;  // a sum that is -0 stays
  const int block = static_cast<int>(
      std::clamp<int64_t>(kBlockBytes / (token_bytes + 1) / 16 * 16, 16, kVocabTileTokens));
  float fp32[sizeof(T) == 2 ? kTokensInL1<W> * kChainColumns : 1];
  for (int first = 0; first < tokens; first += block) {
    const int some = std::min(block, tokens - first);
    Prefetcher prefetcher{reinterpret_cast<const char*>(w + (first + some) * stride)};
    for (int64_t k = 0; k < width || k == 0; k += kChainColumns) {
      const int64_t columns = std::min(kChainColumns, width - k);
      const bool onto = add || k > 0;
      if constexpr (sizeof(T) == 4) {
        all_lanes<W, Fp32Column<W>>(w + first * stride + k, stride, some, x + k * lanes, lanes,
                                    columns, onto, z + first * lanes, prefetcher);
      } else {
        for (int t = 0; t < some; t += kTokensInL1<W>) {
          const int now = std::min(kTokensInL1<W>, some - t);
          for (int n = 0; n < now; ++n) {
            prefetcher.advance<2 * kChainColumns>();
            nabla_fast::copy_to_fp32<W>(w + (first + t + n) * stride + k, columns,
                                        fp32 + n * kChainColumns);
          }
          Prefetcher none{prefetcher.next};
          all_lanes<W, Fp32Column<W>>(fp32, kChainColumns, now, x + k * lanes, lanes, columns, onto,
                                      z + (first + t) * lanes, none);
        }
      }
    }
  }
}

// -- few rows -------------------------------------------------------------------------------------

// Chains of a row that lie word by word behind one another: enough for vectors of 16.
constexpr int kChainsTogether = 4;
constexpr int64_t kColumnsTogether = kChainColumns * kChainsTogether;
// Bytes from the table's elements at work to those being prefetched.
constexpr int64_t kFewPrefetchBytes = 28 << 10;

// Where column `k` of a row lies, and how many words a row takes.
constexpr int64_t word_of_column(int64_t k) {
  return k / kColumnsTogether * kColumnsTogether + k % kChainColumns * kChainsTogether +
         k % kColumnsTogether / kChainColumns;
}
constexpr int64_t words_of_row(int64_t columns) {
  return (columns + kColumnsTogether - 1) / kColumnsTogether * kColumnsTogether;
}
constexpr int padded_few_rows(int rows) { return rows <= 2 ? rows : kMaxFewRows; }

typedef uint32_t Four __attribute__((vector_size(16), aligned(2), may_alias));

// x[lane % (W / kFewTokens)] in each lane.
template <int W>
NABLA_FAST_INLINE Bits<W> repeat(const float* x) {
  if constexpr (W == 16) {
    const Four* const four = reinterpret_cast<const Four*>(x);
#if NABLA_FAST_AVX512
    Bits<W> words;
    asm("vbroadcastf32x4 %1, %0" : "=v"(words) : "m"(*four));
    return words;
#else
    return __builtin_shufflevector(*four, *four, 0, 1, 2, 3, 0, 1, 2, 3, 0, 1, 2, 3, 0, 1, 2, 3);
#endif
  } else if constexpr (W == 8) {
    typedef uint64_t Pairs __attribute__((vector_size(32)));
    uint64_t pair;
    std::memcpy(&pair, x, sizeof pair);
    return (Bits<W>)(Pairs{} + pair);
  } else {
    uint32_t word;
    std::memcpy(&word, x, sizeof word);
    return Bits<W>{} + word;
  }
}

// Words 4 `n` to 4 `n` + 3 of rows `first`, first + 4, ... of W, whose addresses row_at() gives.
template <int W, typename RowAt>
NABLA_FAST_INLINE Bits<W> four_words(const RowAt& row_at, int first, int n) {
  const auto four = [&](int row) -> const Four& {
    return reinterpret_cast<const Four*>(row_at(first + 4 * row))[n];
  };
  if constexpr (W == 16) {
#if NABLA_FAST_AVX512
    // Insertions from memory leave the one port alone that shuffles need.
    Bits<W> words;
    asm("vbroadcasti32x4 %1, %0" : "=v"(words) : "m"(four(0)));
    asm("vinserti32x4 $1, %1, %0, %0" : "+v"(words) : "m"(four(1)));
    asm("vinserti32x4 $2, %1, %0, %0" : "+v"(words) : "m"(four(2)));
    asm("vinserti32x4 $3, %1, %0, %0" : "+v"(words) : "m"(four(3)));
    return words;
#else
    const auto lower = __builtin_shufflevector(four(0), four(1), 0, 1, 2, 3, 4, 5, 6, 7);
    const auto upper = __builtin_shufflevector(four(2), four(3), 0, 1, 2, 3, 4, 5, 6, 7);
    return __builtin_shufflevector(lower, upper, 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14,
                                   15);
#endif
  } else if constexpr (W == 8) {
    return __builtin_shufflevector(four(0), four(1), 0, 1, 2, 3, 4, 5, 6, 7);
  } else {
    return four(0);
  }
}

// In every four lanes, of each pair of words: the lower two, or the upper two, interleaved; likewise
// of pairs of words.
template <int kFrom, int... kLane, typename Vector>
NABLA_FAST_INLINE Vector interleave_words(Vector a, Vector b,
                                          std::integer_sequence<int, kLane...>) {
  constexpr int W = sizeof...(kLane);
  return __builtin_shufflevector(a, b, (kLane / 4 * 4 + kFrom + kLane % 4 / 2 + kLane % 2 * W)...);
}
template <int kFrom, int... kLane, typename Vector>
NABLA_FAST_INLINE Vector interleave_pairs(Vector a, Vector b,
                                          std::integer_sequence<int, kLane...>) {
  constexpr int W = sizeof...(kLane);
  return __builtin_shufflevector(a, b, (kLane / 4 * 4 + kFrom + kLane % 2 + kLane % 4 / 2 * W)...);
}

// words[n] = word n of each of W rows.
template <int W, typename RowAt>
NABLA_FAST_INLINE void load_transposed(const RowAt& row_at, Bits<W> (&words)[W]) {
  constexpr std::make_integer_sequence<int, W> kLanes;
#pragma GCC unroll 4
  for (int n = 0; n < W; n += 4) {
    Bits<W> x[4];
#pragma GCC unroll 4
    for (int first = 0; first < 4; ++first) x[first] = four_words<W>(row_at, first, n / 4);
    const Bits<W> lower = interleave_words<0>(x[0], x[1], kLanes);
    const Bits<W> lower2 = interleave_words<0>(x[2], x[3], kLanes);
    const Bits<W> upper = interleave_words<2>(x[0], x[1], kLanes);
    const Bits<W> upper2 = interleave_words<2>(x[2], x[3], kLanes);
    words[n] = interleave_pairs<0>(lower, lower2, kLanes);
    words[n + 1] = interleave_pairs<2>(lower, lower2, kLanes);
    words[n + 2] = interleave_pairs<0>(upper, upper2, kLanes);
    words[n + 3] = interleave_pairs<2>(upper, upper2, kLanes);
  }
}

// A word of a table's row: a float32 column, two of bf16, or one of pairs.
template <int W, typename T>
struct Words {
  static constexpr int kColumns = 4 / sizeof(T), kColumnBytes = sizeof(T);
  static NABLA_FAST_INLINE void add(Floats<W>& total, Bits<W> words, int part, Bits<W> x) {
    total += (kColumns == 1 ? (Floats<W>)words
              : part        ? upper_to_fp32<W>(words)
                            : lower_to_fp32<W>(words)) *
             (Floats<W>)x;
  }
};

#if NABLA_FAST_BF16_DOT
struct PairWords {
  static constexpr int kColumns = 1, kColumnBytes = 4;
  static NABLA_FAST_INLINE void add(Floats<16>& total, Bits<16> words, int, Bits<16> x) {
    add_bf16_dot(total, words, x);
  }
};
#endif

// total[r], a token and a chain in each lane, += W words of each from column `from` of the chain on.
// w: [kFewTokens] at the first chain's first column, of which `columns` columns are left; x likewise.
template <int W, int R, bool kWhole, typename Word>
NABLA_FAST_INLINE void add_square(const char* const (&w)[kFewTokens], int64_t from, int64_t columns,
                                  const float* x, int64_t x_words, Floats<W> (&total)[R],
                                  Prefetcher& prefetcher) {
  constexpr int kChains = W / kFewTokens;
  const auto row_at = [&](int lane) {
    return w[lane / kChains] + from * Word::kColumnBytes +
           lane % kChains * kChainColumns * Word::kColumnBytes;
  };
  Bits<W> words[W];
  if constexpr (kWhole) {
    prefetcher.advance<4 * W * W>();
    load_transposed<W>(row_at, words);
  } else {
    char ends[W][4 * W] = {};
    for (int lane = 0; lane < W; ++lane) {
      const int64_t rest = columns - from - lane % kChains * kChainColumns;
      if (rest > 0)
        std::memcpy(ends[lane], row_at(lane),
                    std::min(sizeof ends[lane], static_cast<size_t>(rest * Word::kColumnBytes)));
    }
    load_transposed<W>([&](int lane) { return ends[lane]; }, words);
  }
#pragma GCC unroll 16
  for (int n = 0; n < W; ++n) {
#pragma GCC unroll 2
    for (int part = 0; part < Word::kColumns; ++part) {
      const int64_t word = (from + n * Word::kColumns + part) * kChainsTogether;
#pragma GCC unroll 4
      for (int r = 0; r < R; ++r)
        Word::add(total[r], words[n], part, repeat<W>(x + r * x_words + word));
    }
  }
}

// x: [R, x_words]; `columns`: those of the table, or pairs of them.
template <int W, int R, typename Word>
NABLA_FAST_INLINE void tokens_and_chains_in_lanes(const float* x, int64_t x_words, int lanes,
                                                  const Table& table, int64_t columns, int tokens,
                                                  bool add, float* z) {
  constexpr int kChains = W / kFewTokens;
  constexpr int64_t kColumns = kChains * kChainColumns;
  Prefetcher prefetcher{static_cast<const char*>(table.data) + kFewPrefetchBytes};
  for (int first = 0; first < tokens; first += kFewTokens) {
    const int some = std::min(kFewTokens, tokens - first);
    // Added to -0, the first chain keeps the sign that it has as 0.
    const float none = columns > 0 ? -0.0f : 0.0f;
    float sums[R][kFewTokens];
    for (int r = 0; r < R; ++r)
      for (int t = 0; t < kFewTokens; ++t)
        sums[r][t] = add && t < some ? z[(first + t) * lanes + r] : none;
    for (int64_t k = 0; k < columns; k += kColumns) {
      const char* w[kFewTokens];
      // Lanes without a token repeat the last one.
      for (int t = 0; t < kFewTokens; ++t)
        w[t] = static_cast<const char*>(table.from(first + std::min(t, some - 1)).data) +
               k * Word::kColumnBytes;
      Floats<W> total[R] = {};
      const float* const x_at = x + word_of_column(k);
      if (k + kColumns <= columns)
        for (int64_t at = 0; at < kChainColumns; at += W * Word::kColumns)
          add_square<W, R, true, Word>(w, at, kColumns, x_at, x_words, total, prefetcher);
      else
        for (int64_t at = 0; at < kChainColumns; at += W * Word::kColumns)
          add_square<W, R, false, Word>(w, at, columns - k, x_at, x_words, total, prefetcher);
      const auto chains = static_cast<int>(
          std::min<int64_t>(kChains, (columns - k + kChainColumns - 1) / kChainColumns));
#pragma GCC unroll 4
      for (int r = 0; r < R; ++r) {
        float of_chain[W];
        store<W>(of_chain, total[r]);
        for (int c = 0; c < chains; ++c)
          for (int t = 0; t < kFewTokens; ++t) sums[r][t] += of_chain[t * kChains + c];
      }
    }
    for (int r = 0; r < R; ++r)
      for (int t = 0; t < some; ++t) z[(first + t) * lanes + r] = sums[r][t];
  }
}

template <int W, typename Word>
NABLA_FAST_INLINE void few_rows(const PackedRows& rows, const Table& table, int64_t columns,
                                int tokens, bool add, float* z) {
  const auto* x = static_cast<const float*>(rows.data);
  const int lanes = rows.lanes();
  const int64_t x_words = words_of_row(rows.columns());
  if (!add)
    for (int n = 0; n < tokens * lanes; ++n) z[n] = 0;
  switch (padded_few_rows(rows.rows)) {
    case 1:
      return tokens_and_chains_in_lanes<W, 1, Word>(x, x_words, lanes, table, columns, tokens, add,
                                                    z);
    case 2:
      return tokens_and_chains_in_lanes<W, 2, Word>(x, x_words, lanes, table, columns, tokens, add,
                                                    z);
    default:
      return tokens_and_chains_in_lanes<W, kMaxFewRows, Word>(x, x_words, lanes, table, columns,
                                                              tokens, add, z);
  }
}

// -- both -----------------------------------------------------------------------------------------

template <int W, typename T>
NABLA_FAST_INLINE void product_tile(const PackedRows& rows, const Table& table, int tokens,
                                    bool add, float* z) {
  // Two units shuffle vectors of 8, one those of 16.
  constexpr int kFewW = W == 16 ? 8 : W;
  if (rows.rows <= kMaxFewRows)
    few_rows<kFewW, Words<kFewW, T>>(rows, table, table.width, tokens, add, z);
  else
    many_rows<W, T>(rows, table, tokens, add, z);
}

NABLA_FAST_FOR_EACH_ISA(fp32_tile, product_tile<W, float>)
NABLA_FAST_FOR_EACH_ISA(bf16_tile, product_tile<W, uint16_t>)

#if NABLA_FAST_BF16_DOT
NABLA_FAST_TARGET_AVX512 void pair_tile(const PackedRows& rows, const Table& table, int tokens,
                                        bool add, float* z) {
  const auto* x = static_cast<const float*>(rows.data);
  const auto* w = static_cast<const uint16_t*>(table.data);
  const int lanes = rows.lanes();
  const int64_t whole = table.width / 2, stride = table.stride;
  const int block = static_cast<int>(
      std::clamp<int64_t>(kBlockBytes / (2 * table.width + 1) / 16 * 16, 16, kVocabTileTokens));
  const bool few = rows.rows <= kMaxFewRows, nothing = whole == 0 && add;
  if (few) few_rows<16, PairWords>(rows, table, whole, tokens, add, z);
  for (int first = 0; first < tokens && !few && !nothing; first += block) {
    const int some = std::min(block, tokens - first);
    Prefetcher prefetcher{reinterpret_cast<const char*>(w + (first + some) * stride)};
    for (int64_t k = 0; k < whole || k == 0; k += kChainColumns)
      all_lanes<16, Bf16PairColumn>(w + first * stride + 2 * k, stride, some, x + k * lanes, lanes,
                                    std::min(kChainColumns, whole - k), add || k > 0,
                                    z + first * lanes, prefetcher);
  }
  if (table.width % 2 == 0) return;
  // The last column has no other half: the next element in memory is not the row's.
  uint16_t last[2 * kVocabTileTokens] = {};
  for (int t = 0; t < tokens; ++t) last[2 * t] = w[t * stride + table.width - 1];
  const float* last_x = x + whole * lanes;
  float last_of_few[16] = {};
  if (few) {
    const float* const behind = x + padded_few_rows(rows.rows) * words_of_row(rows.columns());
    std::copy_n(behind, rows.rows, last_of_few);
    last_x = last_of_few;
  }
  Prefetcher none{reinterpret_cast<const char*>(w)};
  all_lanes<16, Bf16PairColumn>(last, 2, tokens, last_x, lanes, 1, true, z, none);
}
#endif

// -- rows -----------------------------------------------------------------------------------------

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
      for (int64_t n = 0; n < columns; ++n) store<W>(packed + (k + n) * lanes + r, x[n]);
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

void pack_pairs(const Table& from, int rows, int lanes, float* packed) {
  for (int64_t pair = 0; pair < (from.width + 1) / 2; ++pair)
    for (int r = 0; r < lanes; ++r)
      packed[pair * lanes + r] = r < rows ? pair_of(from, r, pair) : 0.0f;
}

// As few_rows() reads them; behind that a row's last column where it is half of a pair.
void pack_few(const Table& from, int rows, bool pairs, float* packed) {
  const int64_t columns = pairs ? from.width / 2 : from.width;
  const int64_t words = words_of_row(PackedRows{nullptr, rows, from.width, pairs, 0}.columns());
  float* const behind = packed + padded_few_rows(rows) * words;
  // Products of -0 with zeros are -0, which leaves a sum as it is, also one that is -0.
  std::fill(packed, behind, pairs ? bf16_pair(0x8000, 0x8000) : -0.0f);
  for (int r = 0; r < rows; ++r) {
    for (int64_t k = 0; k < columns; ++k)
      packed[r * words + word_of_column(k)] = pairs ? pair_of(from, r, k) : from.value(r, k);
    if (pairs && from.width % 2) behind[r] = pair_of(from, r, columns);
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
