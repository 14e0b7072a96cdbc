// Rows that share a pass over a vocabulary: packed once, in groups, for all tables.
//
// A tile of every table is read from memory once and stays in a cache for all groups. The
// vocabulary is cut into segments by position alone: threads share these, and a segment's results
// do not depend on the thread.
#ifndef NABLA_FAST_CPU_GEMM_ROW_PASS_H_
#define NABLA_FAST_CPU_GEMM_ROW_PASS_H_

#include <algorithm>
#include <cstdint>

#include "base/check.h"
#include "base/threads.h"
#include "gemm/vocab_tiles.h"
#include "nabla_fast.h"

namespace nabla_fast::gemm {

constexpr int64_t kPassSegmentTokens = 1024;
// Most rows of a pass: their packed copies stay in a cache that is not too far away.
constexpr int kGroupsPerPass = 4;
constexpr int64_t kRowsPerPass = kGroupsPerPass * kRowsPerGroup;
// Multiplications worth another thread.
constexpr int64_t kProductsPerThread = 1 << 18;

// Segments of a vocabulary; vocab + kPassSegmentTokens - 1 may overflow in a size query.
inline int64_t pass_segments(int64_t vocab) {
  return vocab / kPassSegmentTokens + (vocab % kPassSegmentTokens > 0);
}

inline int groups_of(int64_t rows) {
  return static_cast<int>((std::min(rows, kRowsPerPass) + kRowsPerGroup - 1) / kRowsPerGroup);
}

// `count` factors, each of rows [rows, width] and the table [vocab, width] of their products: the
// first one, and those of two arrays. A table of the latter may have other rows, table_rows of
// them; a map [vocab] then gives the row of each token.
struct Factors {
  nabla_fast_matrix first_rows, first_table;
  const nabla_fast_matrix* rows;
  const nabla_fast_matrix* tables;
  int64_t count;
  int64_t row_count, vocab;
  const int64_t* const* token_maps = nullptr;
  const int64_t* table_rows = nullptr;

  Table rows_of(int64_t factor) const {
    return gemm::table_of(factor == 0 ? first_rows : rows[factor - 1], row_count);
  }
  Table table_of(int64_t factor) const {
    return gemm::table_of(factor == 0 ? first_table : tables[factor - 1], rows_of_table(factor));
  }
  // Null where a token is its own row.
  const int64_t* map_of(int64_t factor) const {
    return factor > 0 && token_maps ? token_maps[factor - 1] : nullptr;
  }
  int64_t rows_of_table(int64_t factor) const {
    return map_of(factor) ? table_rows[factor - 1] : vocab;
  }
  Size width() const {
    Size sum = 0;
    for (int64_t f = 0; f < count; ++f) sum = sum + table_of(f).width;
    return sum;
  }
};

class RowPass {
 public:
  // Bytes of memory for a pass of `rows` rows, a multiple of kAlignment.
  static Size bytes(int64_t rows, const Factors& factors) {
    Size sum = pointers(rows, factors.count);
    for (int64_t f = 0; f < factors.count; ++f)
      sum = sum + packed_bytes(rows, factors.table_of(f).width) * groups_of(rows);
    return sum;
  }

  // Packs rows [first, first + rows), at most kRowsPerPass.
  RowPass(const Factors& factors, int64_t first, int64_t rows, char* memory)
      : factors_(factors), rows_(static_cast<int>(rows)) {
    packed_ = reinterpret_cast<PackedRows*>(memory);
    memory += pointers(rows, factors.count).or_zero();
    for (int64_t f = 0; f < factors.count; ++f) {
      const Table from = factors.rows_of(f).from(first), table = factors.table_of(f);
      for (int g = 0; g < groups(); ++g) {
        packed_[g * factors.count + f] =
            pack_rows(from.from(g * kRowsPerGroup), rows_of(g), table.dtype, memory);
        memory += packed_bytes(rows, table.width).or_zero();
      }
    }
  }

  int groups() const { return groups_of(rows_); }
  int rows_of(int group) const { return std::min(kRowsPerGroup, rows_ - group * kRowsPerGroup); }
  int lanes_of(int group) const { return gemm::lanes_of(rows_of(group)); }

  // z[t * lanes + r] of one factor for tokens [token, token + tokens), or += it.
  void product(int64_t factor, int group, int64_t token, int tokens, bool add, float* z) const {
    const PackedRows& rows = packed_[group * factors_.count + factor];
    const Table table = factors_.table_of(factor);
    if (const int64_t* map = factors_.map_of(factor))
      mapped_products(rows, table, map + token, tokens, add, z);
    else
      products(rows, table.from(token), tokens, add, z);
  }

 private:
  static Size pointers(int64_t rows, int64_t factors) {
    return (Size(factors) * groups_of(rows) * sizeof(PackedRows)).rounded_up(kAlignment);
  }
  // Bytes of a group; without a value for more columns than PackedRows can count the bytes of.
  static Size packed_bytes(int64_t rows, int64_t width) {
    if (width > kMaxBytes >> 20) return Size(-1);
    const int most = static_cast<int>(std::min<int64_t>(rows, kRowsPerGroup));
    return Size(PackedRows::bytes(most, width)).rounded_up(kAlignment);
  }

  const Factors& factors_;
  PackedRows* packed_;
  int rows_;
};

// Calls work(segment, group, token, tokens) for all tiles and groups; those of a segment in order,
// on one thread.
template <typename Work>
void for_each_pass_tile(int64_t vocab, int groups, int threads, const Work& work) {
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1)
  for (int64_t segment = 0; segment < pass_segments(vocab); ++segment) {
    const int64_t last = std::min(vocab, (segment + 1) * kPassSegmentTokens);
    for (int64_t token = segment * kPassSegmentTokens; token < last; token += kVocabTileTokens) {
      const int tokens = static_cast<int>(std::min<int64_t>(kVocabTileTokens, last - token));
      for (int group = 0; group < groups; ++group) work(segment, group, token, tokens);
    }
  }
}

// Threads for a pass.
inline int pass_threads(int64_t rows, int64_t vocab, const Factors& factors, int32_t asked) {
  // Reading a table costs as much as the arithmetic of some rows.
  const Size work = factors.width() * vocab * (std::min(rows, kRowsPerPass) + 4);
  const int threads = threads_for(work.or_most(), kProductsPerThread, asked);
  return static_cast<int>(std::min<int64_t>(threads, pass_segments(vocab)));
}

// OK if every factor has rows and a table of one width and a known dtype.
inline nabla_fast_status check_factors(const Factors& factors) {
  for (int64_t f = 0; f < factors.count; ++f) {
    const nabla_fast_matrix& x = f == 0 ? factors.first_rows : factors.rows[f - 1];
    const nabla_fast_matrix& table = f == 0 ? factors.first_table : factors.tables[f - 1];
    const int64_t table_rows = factors.rows_of_table(f);
    if (table_rows < 0) return NABLA_FAST_INVALID_SHAPE;
    if (const auto refused = check_matrix(x, factors.row_count, table.width)) return refused;
    if (const auto refused = check_matrix(table, table_rows, x.width)) return refused;
    if (!fits({{factors.vocab, 1}}, sizeof(int64_t))) return NABLA_FAST_TOO_LARGE;
  }
  return NABLA_FAST_OK;
}

// OK if maps name rows that their tables have.
inline nabla_fast_status check_maps(const Factors& factors) {
  for (int64_t f = 0; f < factors.count; ++f) {
    const int64_t* map = factors.map_of(f);
    const int64_t rows = factors.rows_of_table(f);
    if (map &&
        std::any_of(map, map + factors.vocab, [=](int64_t row) { return row < 0 || row >= rows; }))
      return NABLA_FAST_INVALID_TOKEN;
  }
  return NABLA_FAST_OK;
}

}  // namespace nabla_fast::gemm

#endif  // NABLA_FAST_CPU_GEMM_ROW_PASS_H_
