// Slices of a vocabulary: what one block takes of a row. A row's slices have fixed places, whatever
// chunk of the vocabulary a launch takes, so that sums over a slice depend on the row alone.
#ifndef NABLA_FAST_CUDA_SLICES_H_
#define NABLA_FAST_CUDA_SLICES_H_

#include "device.h"
#include "gumbel.h"
#include "joins.h"

namespace nabla_fast::cuda {

constexpr int kSliceTokens = 4096;
constexpr int kThreadTokens = kSliceTokens / kThreads;

constexpr int64_t slices_of(int64_t vocab) { return (vocab + kSliceTokens - 1) / kSliceTokens; }

// Some slices of every row, one after the other.
struct Chunk {
  int first, count;  // slices
  int slices;        // of the whole vocabulary
  int vocab;

  int begin() const { return first * kSliceTokens; }
  int end() const { return first + count == slices ? vocab : (first + count) * kSliceTokens; }
  int tokens() const { return end() - begin(); }
};

// The slice of this block, of a grid that has a block for each row and each of the chunk's slices.
struct SliceOfRow {
  int64_t row;
  int slice;
  int start;  // first token
  int vocab;

  NABLA_FAST_DEVICE explicit SliceOfRow(const Chunk& chunk)
      : row(blockIdx.x / static_cast<unsigned>(chunk.count)),
        slice(chunk.first + static_cast<int>(blockIdx.x % static_cast<unsigned>(chunk.count))),
        start(slice * kSliceTokens),
        vocab(chunk.vocab) {}

  // First token of the four number n of this thread.
  NABLA_FAST_DEVICE int token(int n) const {
    return start + 4 * (n * kThreads + static_cast<int>(threadIdx.x));
  }
};

// Elements of a thread's tokens: those of four number n are 4 n to 4 n + 3.
struct Elements {
  float of[kThreadTokens];
};

template <typename T>
NABLA_FAST_DEVICE bool lies_for_fours(const T* row) {
  return reinterpret_cast<uintptr_t>(row) % sizeof(Four<T>) == 0;
}

// Elements of a row whose token 0 is at `row`; `fill` past the end of the vocabulary.
template <typename T>
NABLA_FAST_DEVICE Elements load_slice(const T* row, const SliceOfRow& at, float fill) {
  const bool fours = lies_for_fours(row);
  Elements elements;
  NABLA_FAST_UNROLL
  for (int n = 0; n < kThreadTokens / 4; ++n) {
    const int token = at.token(n);
    if (fours && token + 4 <= at.vocab) {
      const Four<T> four = load_four(row + token);
      for (int k = 0; k < 4; ++k) elements.of[4 * n + k] = to_float(four.of[k]);
    } else {
      for (int k = 0; k < 4; ++k)
        elements.of[4 * n + k] = token + k < at.vocab ? to_float(row[token + k]) : fill;
    }
  }
  return elements;
}

// Writes four elements from `token` on to a row, those within the vocabulary; `fours`: whether the row lies
// for four at once.
template <typename T>
NABLA_FAST_DEVICE void store_four_within(const Four<T>& four, T* row, int token, int vocab,
                                         bool fours) {
  if (fours && token + 4 <= vocab) {
    store_four(row + token, four);
  } else {
    for (int k = 0; k < 4; ++k)
      if (token + k < vocab) row[token + k] = four.of[k];
  }
}

// Writes a thread's elements, rounded, to a row whose token 0 is at `row`.
template <typename T>
NABLA_FAST_DEVICE void store_slice(const Elements& elements, const SliceOfRow& at, T* row) {
  const bool fours = lies_for_fours(row);
  NABLA_FAST_UNROLL
  for (int n = 0; n < kThreadTokens / 4; ++n) {
    const int token = at.token(n);
    Four<T> four;
    for (int k = 0; k < 4; ++k) four.of[k] = rounded<T>(elements.of[4 * n + k]);
    store_four_within(four, row, token, at.vocab, fours);
  }
}

// Blocks of such a kernel that a multiprocessor holds at least. Noise is computed in double, for which
// it takes twice the registers.
template <bool kNoise>
constexpr int kBlocksHeld = kNoise ? 2 : 4;

// Rows of a matrix whose rows lie `stride` elements apart.
template <typename T>
struct Rows {
  T* data;
  int64_t stride;

  NABLA_FAST_DEVICE T* row(int64_t n) const { return data + n * stride; }
};

// z + g of a slice in float32, -inf past the end of the vocabulary.
template <bool kNoise, typename T>
NABLA_FAST_DEVICE Elements load_logits(const Rows<const T>& logits, const Noise& noise,
                                       const SliceOfRow& at) {
  Elements z = load_slice(logits.row(at.row), at, -kInfinity);
  if (kNoise) {
    const int64_t seed = noise.seed[at.row], position = noise.position[at.row];
    NABLA_FAST_UNROLL
    for (int n = 0; n < kThreadTokens / 4; ++n) {
      const Four<float> g = gumbel_four(seed, position, at.token(n));
      for (int k = 0; k < 4; ++k) z.of[4 * n + k] += g.of[k];
    }
  }
  return z;
}

}  // namespace nabla_fast::cuda

#endif  // NABLA_FAST_CUDA_SLICES_H_
