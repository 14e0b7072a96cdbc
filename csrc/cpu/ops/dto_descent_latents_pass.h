// One pass over a head for some rows of hidden states: their hard tokens, and the gradient of their
// hidden states under a constant one-hot gradient G.
//
// The vocabulary is cut into segments, by position alone. A segment keeps for each row the largest
// y = z + noise so far, M, and under it, with e = exp((y - M) / tau), the sums of e, of e (G - c),
// of e w and of e (G - c) w, w being the head's rows. c is G of the hard token, or, where that is
// not yet known, of the token at M: from any other centre, the gradient of a peaked row would be a
// difference of much larger numbers. Where logits are a function of the products u of head and
// hidden states, the sums over head rows are of e dz/du w. Segments are joined in order, on whatever
// thread they were computed.
#ifndef NABLA_FAST_CPU_OPS_DTO_DESCENT_LATENTS_PASS_H_
#define NABLA_FAST_CPU_OPS_DTO_DESCENT_LATENTS_PASS_H_

#include <algorithm>
#include <cstdint>

#include "gemm/vocab_tiles.h"
#include "softmax/head_map.h"

namespace nabla_fast::descent {

// Rows that share a pass. Each has two sums over head rows, and their arithmetic takes several
// times as long as reading the head.
constexpr int kRowsPerHeadPass = gemm::kRowsPerGroup / 2;

constexpr int64_t kMaxHeadSegments = 32;

// Tokens of a segment: whole tiles, and not so few that joining them costs more than they do.
inline int64_t head_segment_tokens(int64_t vocab) {
  constexpr int64_t kLeast = 16 * gemm::kVocabTileTokens;
  const int64_t tiles = (vocab + kMaxHeadSegments * gemm::kVocabTileTokens - 1) /
                        (kMaxHeadSegments * gemm::kVocabTileTokens);
  return std::max(kLeast, tiles * gemm::kVocabTileTokens);
}
inline int64_t head_segments(int64_t vocab) {
  return (vocab + head_segment_tokens(vocab) - 1) / head_segment_tokens(vocab);
}

struct PassRow {
  const float* grad;       // [vocab] G
  int64_t seed, position;  // of its noise
  bool centred;            // whether `centre` is G of the hard token; else it is looked for
  float centre;
};

// Scales of a pass: G and the head may hold numbers so large that sums overflow in the first though
// the gradient does not. The second's stay finite: exponentials, which are multiplied by 2^24 in
// both, are at most 2^-64 in it.
constexpr float kPassScales[] = {1, 0x1p-88f};

struct HeadPass {
  gemm::PackedRows rows;  // hidden states, at most kRowsPerHeadPass
  gemm::Table head;       // [vocab, width]
  softmax::HeadMap map;   // of their products
  float inverse_tau;
  float scale;  // of exponentials
  bool noise;
  PassRow row[kRowsPerHeadPass];
};

// Sums of a row over a segment.
struct SegmentSums {
  double sum;                // of e
  double weighted_grad_sum;  // of e (G - c)
  float max;                 // M
  float centre;              // c
  int64_t token;             // the first at M
  int64_t nan;               // the first token whose y is NaN, or -1
};

// A row of the two sums over head rows has room for padded(width) floats; those of e w of all rows
// come before those of e (G - c) w.
inline int64_t weighted_sums_floats(int rows, int64_t width) { return 2 * rows * padded(width); }

// Tokens [first, last) of a segment. found: [rows]; weighted_sums: weighted_sums_floats(), null if
// no sums are asked for.
void pass_segment(const HeadPass& pass, int64_t first, int64_t last, SegmentSums* found,
                  float* weighted_sums);

// Results of a pass for a row.
struct HeadPassResult {
  float max;      // largest y
  int64_t token;  // argmax as torch has it: the first NaN, or else the first of the largest
  bool nan;       // whether a y is NaN
  double mean;    // <p, G - G[token]>, if sums were asked for
};

// Joins the sums of all segments of row `index` of a pass: found[s * rows + index], with the
// weighted sums of segment s from weighted_sums + s * weighted_sums_floats(rows, width) on.
// gradient: [width] of the row's hidden state, null if no sums were asked for.
HeadPassResult join_segments(const SegmentSums* found, const float* weighted_sums, int64_t segments,
                             int rows, int index, int64_t width, double tau, float* gradient);

}  // namespace nabla_fast::descent

#endif  // NABLA_FAST_CPU_OPS_DTO_DESCENT_LATENTS_PASS_H_
