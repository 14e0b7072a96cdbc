// products() and pack_rows().
//
// Many rows: rows lie in the vectors' lanes, and every element of the table is broadcast to a
// vector once; the table is read as it is. Few rows: tokens lie in the lanes, a square of tokens
// and columns being transposed in registers. An element's multiply-adds are the same ones in the
// same order either way.
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
// Rows up to which tokens lie in the lanes.
constexpr int kMaxFewRows = 8;
// Bytes of a table that are multiplied while those behind them are prefetched: both stay in the
// second-level cache.
constexpr int64_t kBlockBytes = 256 << 10;
// Columns between two prefetches.
constexpr int kColumnsPerPrefetch = 4;

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
  static NABLA_FAST_INLINE Vector broadcast(const uint16_t* pair) {
    uint32_t word;
    std::memcpy(&word, pair, sizeof word);
    Vector words = Vector{} + word;
    keep_in_register<16>(words);
    return words;
  }
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
  constexpr int kElements = Column::kElements;
  Floats<W> total[kTokens * C] = {};
  int64_t k = 0;
  for (; k + kColumnsPerPrefetch <= columns; k += kColumnsPerPrefetch) {
    prefetcher.advance<kTokens * kColumnsPerPrefetch * kElements * sizeof(*w)>();
#pragma GCC unroll 4
    for (int u = 0; u < kColumnsPerPrefetch; ++u)
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
    for (int lane = 0; lane < lanes; lane += 2 * W)
      chains<W, 2, 4, Column>(w, stride, tokens, x + lane, lanes, columns, add, z + lane,
                              prefetcher);
  }
}

template <int W, typename T>
NABLA_FAST_INLINE void many_rows(const PackedRows& rows, const Table& table, int tokens, bool add,
                                 float* z) {
  const auto* x = static_cast<const float*>(rows.data);
  const auto* w = static_cast<const T*>(table.data);
  const int lanes = rows.lanes();
  const int64_t width = table.width, stride = table.stride, token_bytes = sizeof(T) * width;
  const int block = static_cast<int>(
      std::clamp<int64_t>(kBlockBytes / (token_bytes + 1) / 16 * 16, 16, kVocabTileTokens));
  constexpr int kTokensInFp32 = 16;  // tokens that are converted at a time
  float fp32[sizeof(T) == 2 ? kTokensInFp32 * kChainColumns : 1];
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
        for (int t = 0; t < some; t += kTokensInFp32) {
          const int now = std::min(kTokensInFp32, some - t);
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

// W words of a row: floats or pairs of bf16; zeros behind the first `bytes` bytes.
template <int W>
NABLA_FAST_INLINE Bits<W> load_words(const char* x, int64_t bytes) {
  Bits<W> words = {};
  if (bytes >= 4 * W)
    std::memcpy(&words, x, 4 * W);
  else
    std::memcpy(&words, x, static_cast<size_t>(bytes));
  return words;
}

// total[r] += W tokens times row r, for `R` rows and at most W words of columns. T: elements of the
// table, one or two to a word.
template <int W, int R, typename T>
NABLA_FAST_INLINE void add_square(const char* const (&w)[W], int64_t from, int64_t columns,
                                  const float* x, int lanes, Floats<W> (&total)[R],
                                  Prefetcher& prefetcher) {
  constexpr int kColumns = 4 / sizeof(T);  // of a word
  prefetcher.advance<4 * W * W>();
  Bits<W> words[W];
#pragma GCC unroll 16
  for (int t = 0; t < W; ++t)
    words[t] = load_words<W>(w[t] + from * static_cast<int64_t>(sizeof(T)),
                             columns * static_cast<int64_t>(sizeof(T)));
  transpose<W>(words);
#pragma GCC unroll 16
  for (int n = 0; n < W; ++n) {
#pragma GCC unroll 2
    for (int part = 0; part < kColumns; ++part) {
      const int64_t k = n * kColumns + part;
      if (k >= columns) return;
      const Floats<W> column = kColumns == 1 ? (Floats<W>)words[n]
                               : part        ? upper_to_fp32<W>(words[n])
                                             : lower_to_fp32<W>(words[n]);
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r) total[r] += column * x[(from + k) * lanes + r];
    }
  }
}

template <int W, int R, typename T>
NABLA_FAST_INLINE void rows_with_tokens_in_lanes(const float* x, int lanes, const Table& table,
                                                 int tokens, bool add, float* z) {
  constexpr int64_t kColumns = W * (4 / sizeof(T));
  for (int first = 0; first < tokens; first += W) {
    const int some = std::min(W, tokens - first);
    const char* w[W];
    // Lanes without a token repeat the last one.
    for (int t = 0; t < W; ++t)
      w[t] = static_cast<const char*>(table.from(first + std::min(t, some - 1)).data);
    Prefetcher prefetcher{static_cast<const char*>(table.from(first + some).data)};
    for (int64_t k = 0; k < table.width || k == 0; k += kChainColumns) {
      const int64_t end = std::min(table.width, k + kChainColumns);
      Floats<W> total[R] = {};
      for (int64_t at = k; at < end; at += kColumns)
        add_square<W, R, T>(w, at, std::min(kColumns, end - at), x, lanes, total, prefetcher);
      const bool onto = add || k > 0;
      for (int r = 0; r < R; ++r) {
        for (int t = 0; t < some; ++t) {
          float* out = z + (first + t) * lanes + r;
          *out = onto ? *out + total[r][t] : total[r][t];
        }
      }
    }
  }
}

template <int W, typename T>
NABLA_FAST_INLINE void few_rows(const PackedRows& rows, const Table& table, int tokens, bool add,
                                float* z) {
  const auto* x = static_cast<const float*>(rows.data);
  const int lanes = rows.lanes();
  if (!add)
    for (int n = 0; n < tokens * lanes; ++n) z[n] = 0;
  switch (rows.rows) {
    case 1:
      return rows_with_tokens_in_lanes<W, 1, T>(x, lanes, table, tokens, add, z);
    case 2:
      return rows_with_tokens_in_lanes<W, 2, T>(x, lanes, table, tokens, add, z);
    case 3:
    case 4:
      return rows_with_tokens_in_lanes<W, 4, T>(x, lanes, table, tokens, add, z);
    default:
      return rows_with_tokens_in_lanes<W, 8, T>(x, lanes, table, tokens, add, z);
  }
}

// -- both -----------------------------------------------------------------------------------------

template <int W, typename T>
NABLA_FAST_INLINE void product_tile(const PackedRows& rows, const Table& table, int tokens,
                                    bool add, float* z) {
  if (rows.rows <= kMaxFewRows)
    few_rows<W, T>(rows, table, tokens, add, z);
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
  for (int first = 0; first < tokens; first += block) {
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
  Prefetcher none{reinterpret_cast<const char*>(w)};
  all_lanes<16, Bf16PairColumn>(last, 2, tokens, x + whole * lanes, lanes, 1, true, z, none);
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

void pack_pairs(const Table& from, int rows, int lanes, uint16_t* packed) {
  const auto* data = static_cast<const uint16_t*>(from.data);
  for (int r = 0; r < lanes; ++r) {
    for (int64_t k = 0; k < from.width + from.width % 2; ++k) {
      const bool there = r < rows && k < from.width;
      packed[k / 2 * 2 * lanes + 2 * r + k % 2] = there ? data[r * from.stride + k] : 0;
    }
  }
}

}  // namespace

PackedRows pack_rows(const Table& from, int rows, nabla_fast_dtype table_dtype, void* memory) {
  if (table_dtype == NABLA_FAST_BFLOAT16 && nabla_fast_cpu_isa() >= NABLA_FAST_ISA_AMX)
    return pack_amx(from, rows, memory);
  const bool both = from.dtype == NABLA_FAST_BFLOAT16 && table_dtype == NABLA_FAST_BFLOAT16;
  const bool pairs = both && nabla_fast_cpu_isa() >= NABLA_FAST_ISA_AVX512_BF16;
  const int lanes = lanes_of(rows);
  if (pairs)
    pack_pairs(from, rows, lanes, static_cast<uint16_t*>(memory));
  else
    pack_fp32(from, rows, lanes, static_cast<float*>(memory));
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
