// nabla_fast_embedding_mix: products of relaxed one-hot rows with tables.
//
// Soft: a segment's weights are relative to the largest y that its row has shown so far; where that
// moves, the sums are rescaled. For tables of bf16 they are rounded to it where that is faster.
// Tables may hold numbers so large that sums overflow though mixes do not: then there is a second
// pass, with kSmallScale. Hard: only the largest y is looked for.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>

#include "base/check.h"
#include "base/floats.h"
#include "base/threads.h"
#include "nabla_fast.h"
#include "ops/embedding_mix_call.h"
#include "ops/embedding_mix_sums.h"

namespace nabla_fast::mix {
namespace {

// Multiply-adds worth another thread.
constexpr int64_t kWorkPerThread = int64_t{1} << 21;

// Floats of a group's mixes of all tables.
Size mix_floats(const nabla_fast_mix_args& call) {
  Size width = 0;
  for (int64_t t = 0; t < call.table_count; ++t)
    width = width + Size(call.tables[t].width).rounded_up(16);
  return width * std::min<int64_t>(call.rows, gemm::kRowsPerGroup);
}

// Segments computed at once.
int parts_of(const nabla_fast_mix_args& call) {
  Size width = is_linear(call) ? call.head.width : 0;
  for (int64_t t = 0; t < call.table_count && !call.hard; ++t) width = width + call.tables[t].width;
  const Size work =
      (width + 16) * call.vocab * (std::min<int64_t>(call.rows, gemm::kRowsPerGroup) + 4);
  return static_cast<int>(std::min<int64_t>(
      threads_for(work.or_most(), kWorkPerThread, call.num_threads), mix_segments(call.vocab)));
}

float* mix_row(const nabla_fast_mix_args& call, int64_t t, int64_t row) {
  return static_cast<float*>(call.mixes[t].data) + row * stride_of(call.mixes[t], call.rows);
}

// Writes a row's mixes: those of its hard token, or NaN where `status` is not OK.
void write_row(const nabla_fast_mix_args& call, int64_t row, nabla_fast_status status,
               int64_t token) {
  for (int64_t t = 0; t < call.table_count; ++t) {
    const int64_t width = call.tables[t].width;
    float* out = mix_row(call, t, row);
    for (int64_t k = 0; k < width; ++k)
      out[k] = status == NABLA_FAST_OK ? gemm::table_of(call.tables[t], call.vocab).value(token, k)
                                       : kNaN;
  }
}

// -- soft -----------------------------------------------------------------------------------------

// Weights of a pass: e scale, with e rounded to bf16 or not.
struct Weights {
  float scale;
  bool bf16;
};

// Fewest columns of a table whose weights are rounded. The rounding errors of a mix are as large as
// those of its elements where these do not cancel; a few elements may all cancel.
constexpr int64_t kRoundedColumns = 16;

// Whether weights are rounded: all tables share them, and one of fp32 needs their digits.
bool rounds_weights(const nabla_fast_mix_args& call) {
  const nabla_fast_isa isa = nabla_fast_cpu_isa();
  bool all = call.table_count > 0;
  for (int64_t t = 0; t < call.table_count; ++t)
    all = all && call.tables[t].width >= kRoundedColumns &&
          gemm::rounds_weights(gemm::table_of(call.tables[t], call.vocab), isa);
  return all;
}

void add_segment(const RowGroup& group, Weights weights, int64_t segment, int64_t floats,
                 MixSums& part) {
  const nabla_fast_mix_args& call = group.call;
  constexpr int kTiles = gemm::kMostSumTokens / gemm::kVocabTileTokens;
  alignas(64) float y[kTiles * softmax::kTileFloats];
  float factor[gemm::kRowsPerGroup];
  const int lanes = gemm::lanes_of(group.rows);
  part.clear(floats);
  const int64_t begin = segment * kMixSegmentTokens;
  const int64_t end = std::min(call.vocab, begin + kMixSegmentTokens);
  for (int64_t token = begin; token < end; token += gemm::kMostSumTokens) {
    const int tokens = static_cast<int>(std::min<int64_t>(gemm::kMostSumTokens, end - token));
    for (int t = 0; t < tokens; t += gemm::kVocabTileTokens)
      group.load_and_keep(token + t, std::min(gemm::kVocabTileTokens, tokens - t), y + t * lanes);
    if (softmax::update_max(y, group.rows, token, tokens, call.tau, part.tops, factor)) {
      float* mixed = part.mixes();
      for (int r = 0; r < group.rows; ++r) part.sums.e[r] *= factor[r];
      for (int64_t t = 0; t < call.table_count; ++t) {
        const int64_t width = padded(call.tables[t].width);
        for (int r = 0; r < group.rows; ++r, mixed += width)
          if (factor[r] != 1)
            for (int64_t k = 0; k < width; ++k) mixed[k] *= factor[r];
      }
    }
    for (int t = 0; t < tokens; t += gemm::kVocabTileTokens)
      softmax::exp_and_sum(y + t * lanes, group.rows, std::min(gemm::kVocabTileTokens, tokens - t),
                           part.tops.max, call.tau, weights.bf16, part.sums);
    scale_tile(y, group.rows, tokens, weights.scale);
    float* mixed = part.mixes();
    for (int64_t t = 0; t < call.table_count; ++t) {
      const gemm::Table table = gemm::table_of(call.tables[t], call.vocab);
      gemm::add_weighted_sums(y, lanes, group.rows, table.from(token), tokens, mixed, weights.bf16);
      mixed += group.rows * padded(table.width);
    }
  }
}

void join_row(const RowGroup& group, int row, MixSums& part, MixSums& total) {
  softmax::Tops& tops = total.tops;
  tops.nan[row] |= part.tops.nan[row];
  const float before = tops.max[row], here = part.tops.max[row];
  if (here > before) {
    tops.max[row] = here;
    tops.token[row] = part.tops.token[row];
  }
  if (tops.token[row] < 0) return;
  const double scale = softmax::rescale(before, tops.max[row], group.call.tau);
  const double part_scale = softmax::rescale(here, tops.max[row], group.call.tau);
  total.sums.e[row] = scale * total.sums.e[row] + part_scale * part.sums.e[row];
  int64_t begin = 0;
  for (int64_t t = 0; t < group.call.table_count; ++t) {
    const int64_t width = padded(group.call.tables[t].width);
    float* to = total.mixes() + begin + row * width;
    const float* from = part.mixes() + begin + row * width;
    const float a = static_cast<float>(scale), b = static_cast<float>(part_scale);
    for (int64_t k = 0; k < width; ++k) to[k] = a * to[k] + b * from[k];
    begin += group.rows * width;
  }
}

// Sums over all segments, in `memory`.
MixSums& sum_group(const RowGroup& group, Weights weights, int threads, char* memory) {
  const nabla_fast_mix_args& call = group.call;
  const int64_t floats = mix_floats(call).or_zero(), bytes = MixSums::bytes(floats).or_zero();
  auto* total = reinterpret_cast<MixSums*>(memory);
  const auto part = [=](int64_t n) { return reinterpret_cast<MixSums*>(memory + (n + 1) * bytes); };
  total->clear(floats);
  in_rounds(
      mix_segments(call.vocab), group.rows, threads,
      [&](int64_t segment, int64_t n) { add_segment(group, weights, segment, floats, *part(n)); },
      [&](int row, int64_t n) { join_row(group, row, *part(n), *total); });
  return *total;
}

// Calls visit(mix, element) for every element of a row's mixes.
template <typename Visit>
void for_each_mix(const RowGroup& group, float scale, int row, MixSums& total, const Visit& visit) {
  const auto inverse = static_cast<float>(1 / (scale * total.sums.e[row]));
  const float* mixed = total.mixes();
  for (int64_t t = 0; t < group.call.table_count; ++t) {
    const int64_t width = group.call.tables[t].width;
    float* const out = mix_row(group.call, t, group.first + row);
    for (int64_t k = 0; k < width; ++k) visit(mixed[row * padded(width) + k] * inverse, out[k]);
    mixed += group.rows * padded(width);
  }
}

void soft_group(const RowGroup& group, int threads, char* memory) {
  const nabla_fast_mix_args& call = group.call;
  const bool bf16 = rounds_weights(call);
  bool finite = true;
  MixSums& total = sum_group(group, {1, bf16}, threads, memory);
  for (int r = 0; r < group.rows; ++r) {
    const int64_t row = group.first + r;
    call.row_status[row] = total.tops.status(r);
    if (call.row_status[row] != NABLA_FAST_OK) {
      write_row(call, row, call.row_status[row], -1);
      continue;
    }
    for_each_mix(group, 1, r, total, [&](float mix, float& out) {
      out = mix;
      finite = finite && std::isfinite(mix);
    });
  }
  if (finite) return;
  sum_group(group, {kSmallScale, bf16}, threads, memory);
  for (int r = 0; r < group.rows; ++r) {
    if (call.row_status[group.first + r] != NABLA_FAST_OK) continue;
    for_each_mix(group, kSmallScale, r, total, [](float mix, float& out) {
      if (!std::isfinite(out) && std::isfinite(mix)) out = mix;
    });
  }
}

// -- hard -----------------------------------------------------------------------------------------

void hard_group(const RowGroup& group, int threads, char* memory) {
  const nabla_fast_mix_args& call = group.call;
  auto* total = reinterpret_cast<softmax::Tops*>(memory);
  total->clear();
  in_rounds(
      mix_segments(call.vocab), group.rows, threads,
      [&](int64_t segment, int64_t n) {
        alignas(64) float y[softmax::kTileFloats];
        float factor[gemm::kRowsPerGroup];
        total[n + 1].clear();
        for_each_segment_tile(segment, call.vocab, [&](int64_t token, int tokens) {
          group.load_and_keep(token, tokens, y);
          softmax::update_max(y, group.rows, token, tokens, call.tau, total[n + 1], factor);
        });
      },
      [&](int row, int64_t n) {
        const softmax::Tops& part = total[n + 1];
        total->nan[row] |= part.nan[row];
        if (!(part.max[row] > total->max[row])) return;
        total->max[row] = part.max[row];
        total->token[row] = part.token[row];
      });
  for (int r = 0; r < group.rows; ++r) {
    const int64_t row = group.first + r;
    call.row_status[row] = total->status(r);
    write_row(call, row, call.row_status[row], total->token[r]);
  }
}

void hard_rows(const nabla_fast_mix_args& call, int64_t first, int rows, char* memory) {
  softmax::Top tops[gemm::kRowsPerGroup];
  softmax::tops_of_rows(gemm::table_of(call.logits, call.rows).from(first), rows, call.vocab,
                        keys_from(call, first), call.num_threads,
                        reinterpret_cast<softmax::Top*>(memory), tops);
  for (int r = 0; r < rows; ++r) {
    call.row_status[first + r] = tops[r].status();
    write_row(call, first + r, call.row_status[first + r], tops[r].token);
  }
}

Size workspace_of(const nabla_fast_mix_args& call) {
  if (call.rows == 0) return 0;
  const int64_t rows = std::min<int64_t>(call.rows, gemm::kRowsPerGroup);
  if (call.hard && !is_linear(call))
    return Size(softmax::top_parts(rows, call.vocab)) * sizeof(softmax::Top) + kAlignment;
  const Size part = call.hard ? Size(sizeof(softmax::Tops)) : MixSums::bytes(mix_floats(call));
  return RowGroup::hidden_bytes(call) + part * (parts_of(call) + 1) + kAlignment;
}

nabla_fast_status check_mixes(const nabla_fast_mix_args& call) {
  if (call.table_count > 0 && !call.mixes) return NABLA_FAST_INVALID_POINTER;
  for (int64_t t = 0; t < call.table_count; ++t)
    if (const auto refused = check_float32(call.mixes[t], call.rows, call.tables[t].width))
      return refused;
  return call.row_status ? NABLA_FAST_OK : NABLA_FAST_INVALID_POINTER;
}

}  // namespace
}  // namespace nabla_fast::mix

using namespace nabla_fast;
using namespace nabla_fast::mix;

int64_t nabla_fast_embedding_mix_workspace(const nabla_fast_mix_args* args) {
  return workspace_bytes(args, check_mix, workspace_of);
}

nabla_fast_status nabla_fast_embedding_mix(const nabla_fast_mix_args* args) {
  nabla_fast_mix_args call;
  if (const auto refused = read_args(args, call)) return refused;
  if (const auto refused = check_mix(call)) return refused;
  if (call.rows == 0) return NABLA_FAST_OK;
  if (const auto refused = check_mixes(call)) return refused;
  const int64_t bytes = workspace_of(call).or_zero();
  if (const auto refused = check_workspace(call, bytes)) return refused;
  const bool overlap = any_overlap([&](auto& arrays) {
    arrays.writes(array_of(call.row_status, call.rows));
    arrays.writes(array_of_bytes(call.workspace, bytes));
    for (int64_t t = 0; t < call.table_count; ++t)
      arrays.writes(array_of(call.mixes[t], call.rows));
    arrays.writes(perturbed_of(call));
    arrays.reads(array_of(call.mixes, call.table_count));
    list_inputs(call, arrays);
  });
  if (overlap) return NABLA_FAST_OVERLAP;
  char* memory = aligned(call.workspace);
  const int threads = parts_of(call);
  for (int64_t first = 0; first < call.rows; first += gemm::kRowsPerGroup) {
    const int rows = static_cast<int>(std::min<int64_t>(gemm::kRowsPerGroup, call.rows - first));
    if (call.hard && !is_linear(call)) {
      hard_rows(call, first, rows, memory);
      continue;
    }
    const RowGroup group(call, first, memory);
    char* sums = memory + RowGroup::hidden_bytes(call).or_zero();
    if (call.hard)
      hard_group(group, threads, sums);
    else
      soft_group(group, threads, sums);
  }
  return NABLA_FAST_OK;
}
