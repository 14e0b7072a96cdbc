// Sums over a row of logits z and its one-hot gradient G, from slices: what the softmax's Jacobian needs.
//
// dz = (1 / tau) p (G - <p, G>) takes the largest z with its token, S = sum exp((z - max) / tau), and T = sum
// exp((z - max) / tau) (G - G[token]). A slice takes its sums relative to its own largest z and to the G found
// there; both move to the row's by arithmetic on a few numbers, so that z and G are read once.
#ifndef NABLA_FAST_CUDA_GRADIENT_SUMS_H_
#define NABLA_FAST_CUDA_GRADIENT_SUMS_H_

#include "exponential.h"
#include "joins.h"
#include "row_tops.h"
#include "slices.h"

namespace nabla_fast::cuda {

struct SliceSums {
  float top;   // the largest z, NaN if a logit is
  int token;   // of the largest z, the first of equal ones
  float sum;   // S
  float tilt;  // T, where G is finite
  float grad;  // G of the token; 0 where that is not finite
  float lost;  // the largest z at which G is not finite
};

// The nearest number with 24 bits of float32's 32; infinite and NaN as they are.
NABLA_FAST_DEVICE float cut_to_24_bits(float x) {
  const uint32_t bits = bits_of(x);
  return float_of((fabsf(x) < 3.4e38f ? bits + 0x80 : bits) & 0xFFFFFF00);
}

// The upper 16 of these bits, and the other 8: elements of arrays of their own.
struct Upper16 {
  uint16_t bits;
};
struct Next8 {
  uint8_t bits;
};
template <>
NABLA_FAST_DEVICE Upper16 rounded<Upper16>(float x) {
  return {static_cast<uint16_t>(bits_of(x) >> 16)};
}
template <>
NABLA_FAST_DEVICE Next8 rounded<Next8>(float x) {
  return {static_cast<uint8_t>(bits_of(x) >> 8)};
}

// G - G[token of the slice] of rows of the vocabulary, between two passes.
struct CutGradient {
  Rows<Upper16> upper;
  Rows<Next8> next;

  NABLA_FAST_DEVICE void store(const Elements& centred, const SliceOfRow& at) const {
    store_slice(centred, at, upper.row(at.row));
    store_slice(centred, at, next.row(at.row));
  }
  NABLA_FAST_DEVICE Elements load(const SliceOfRow& at) const {
    const Upper16* const uppers = upper.row(at.row);
    const Next8* const nexts = next.row(at.row);
    const bool fours = lies_for_fours(uppers) && lies_for_fours(nexts);
    Elements centred;
    NABLA_FAST_UNROLL
    for (int n = 0; n < kThreadTokens / 4; ++n) {
      const int token = at.token(n);
      if (fours && token + 4 <= at.vocab) {
        const Four<Upper16> u = load_four(uppers + token);
        const Four<Next8> v = load_four(nexts + token);
        for (int k = 0; k < 4; ++k) centred.of[4 * n + k] = joined(u.of[k], v.of[k]);
      } else {
        for (int k = 0; k < 4; ++k)
          centred.of[4 * n + k] =
              token + k < at.vocab ? joined(uppers[token + k], nexts[token + k]) : 0;
      }
    }
    return centred;
  }

 private:
  static NABLA_FAST_DEVICE float joined(Upper16 u, Next8 v) {
    return float_of(uint32_t{u.bits} << 16 | uint32_t{v.bits} << 8);
  }
};

// Whether a pass between two that reads G leaves it in this form, in the memory of a result of type T.
template <typename T>
constexpr bool kCuts = sizeof(T) == 2;

// Blocks of such a kernel that a multiprocessor holds at least: two arrays of G take registers.
template <typename T, bool kNoise>
constexpr int kCutsHeld = kCuts<T> && !kNoise ? 3 : kBlocksHeld<kNoise>;

// Fills the slices of a chunk; a block has one of them. `cut` is written where kCuts<T>.
template <typename T, bool kNoise>
__global__ void __launch_bounds__(kThreads, (kCutsHeld<T, kNoise>))
    survey_kernel(Rows<const T> logits, Noise noise, Chunk chunk, Temperature tau,
                  Rows<const float> grad, SliceSums* sums, CutGradient cut) {
  const SliceOfRow at(chunk);
  const Elements z = load_logits<kNoise>(logits, noise, at);
  Elements g = load_slice(grad.row(at.row), at, 0);
  const SliceTop found = top_of_slice(z, at);
  const float reference = fabsf(found.top.value) < kInfinity ? found.top.value : 0;
  float here = 0, lost = -kInfinity;
  NABLA_FAST_UNROLL
  for (int n = 0; n < kThreadTokens; ++n) {
    const bool finite = fabsf(g.of[n]) < kInfinity;
    if (finite && at.token(n / 4) + n % 4 == found.top.token) here = g.of[n];
    if (!finite) lost = fmaxf(lost, z.of[n]);
  }
  // One thread has the token, if any.
  here = join_block(here, Sum{});
  lost = join_block(lost, Largest{});
  float sum = 0, tilt = 0;
  NABLA_FAST_UNROLL
  for (int n = 0; n < kThreadTokens; ++n) {
    const float e = tempered_exp(z.of[n] - reference, tau);
    const bool finite = fabsf(g.of[n]) < kInfinity;
    g.of[n] -= here;
    if (kCuts<T>) g.of[n] = cut_to_24_bits(g.of[n]);
    sum += e;
    if (finite) tilt += e * g.of[n];
  }
  if (kCuts<T>) cut.store(g, at);
  sum = join_block(sum, Sum{});
  tilt = join_block(tilt, Sum{});
  if (threadIdx.x == 0)
    sums[at.row * chunk.slices + at.slice] = {
        found.nan ? kNaN : found.top.value, found.top.token, sum, tilt, here, lost};
}

// Of a row.
struct RowSums {
  nabla_fast_status status;
  float top;     // the largest z; 0 where that is not finite
  float grad;    // G of its token
  float weight;  // 1 / (S tau)
  float mean;    // T / S = <p, G> - G[token], of tokens whose G is finite
  bool spoiled;  // whether G is not finite at a token of some probability
};

// Joins the first slices of a row, for every lane of a warp. Of masked tokens alone the mean is 0.
NABLA_FAST_DEVICE RowSums join_slices(const SliceSums* slices, int count, const Temperature& tau) {
  const int step = static_cast<int>(kWarpThreads);
  const RowTop found =
      top_of_row(count, [&](int n) { return Top{slices[n].top, slices[n].token}; });
  const float reference = found.status == NABLA_FAST_OK ? found.top.value : 0;
  float grad = 0;
  for (int n = lane(); n < count; n += step)
    if (slices[n].token == found.top.token) grad = slices[n].grad;
  grad = join_warp(grad, Sum{});
  double sum = 0, tilt = 0;
  bool spoiled = false;
  for (int n = lane(); n < count; n += step) {
    const SliceSums slice = slices[n];
    const float share = tempered_exp(slice.top - reference, tau);
    sum += double{share} * slice.sum;
    if (share > 0) tilt += double{share} * (slice.tilt + slice.sum * (slice.grad - grad));
    spoiled = spoiled || tempered_exp(slice.lost - reference, tau) > 0;
  }
  sum = join_warp(sum, Sum{});
  tilt = join_warp(tilt, Sum{});
  spoiled = any_of_warp(spoiled);
  return {found.status,
          reference,
          grad,
          static_cast<float>(tau.inverse / sum),
          sum > 0 ? static_cast<float>(tilt / sum) : 0,
          spoiled};
}

}  // namespace nabla_fast::cuda

#endif  // NABLA_FAST_CUDA_GRADIENT_SUMS_H_
