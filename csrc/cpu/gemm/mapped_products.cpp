// Products with rows of a table at indices given by a map: some at a time are copied side by side,
// and multiplied as a table that lies so from the start.

#include <algorithm>
#include <cstdint>
#include <cstring>

#include "gemm/vocab_tiles.h"

namespace nabla_fast::gemm {
namespace {

// Bytes of the copies, on the stack and in a near cache.
constexpr int64_t kNearBytes = 128 << 10;

// Number of rows that follow each other in the table, from the first on.
int run_length(const int64_t* token_rows, int tokens) {
  int run = 1;
  while (run < tokens && token_rows[run] == token_rows[0] + run) ++run;
  return run;
}

}  // namespace

void mapped_products(const PackedRows& rows, const Table& table, const int64_t* token_rows,
                     int tokens, bool add, float* z) {
  const int lanes = rows.lanes();
  const int64_t row_bytes = table.width * table.bytes();
  // Rows of no width need no copy, and the table may be null.
  if (row_bytes == 0) return products(rows, table, tokens, add, z);
  const int fit = static_cast<int>(std::min<int64_t>(kNearBytes / row_bytes, kVocabTileTokens));
  // Products of whole vectors of tokens are the fast ones.
  const int most = fit >= 16 ? fit / 16 * 16 : fit;
  alignas(64) char near[kNearBytes];
  for (int t = 0; t < tokens;) {
    const int run = run_length(token_rows + t, tokens - t);
    if (run >= std::min(most, tokens - t) || most == 0) {
      products(rows, table.from(token_rows[t]), run, add, z + t * lanes);
      t += run;
      continue;
    }
    const int some = std::min(most, tokens - t);
    for (int n = 0; n < some; ++n)
      std::memcpy(near + n * row_bytes, table.from(token_rows[t + n]).data,
                  static_cast<size_t>(row_bytes));
    products(rows, {near, table.dtype, table.width, table.width}, some, add, z + t * lanes);
    t += some;
  }
}

}  // namespace nabla_fast::gemm
