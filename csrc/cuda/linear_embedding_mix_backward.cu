// dh = head^T dz, dz = (1 / tau) p (G - <p, G>), with z and G of a chunk of the vocabulary made by products.
//
// One pass over the vocabulary. <p, G> is known at its end; until then the head's rows are summed twice, with
// weights e = exp(z / tau) 2^-k and with e (G - c), c the <p, G> of the chunks so far, and the second sums are
// moved by the first as c changes: 2 N V (3 H + sum H_t) operations, where the least is 2 N V (2 H + sum H_t),
// and a second pass, which would make z and G again, takes 2 N V (3 H + 2 sum H_t).
//
// Before a bf16 head the weights are bf16 terms, for the matrix units, as exact as the hidden states are: three
// for float32 ones, two for float16, one for bf16.

#include "exponential.h"
#include "gradient_sums.h"
#include "joins.h"
#include "launch.h"
#include "linear_embedding_mix_backward.h"
#include "mix_gradient.h"
#include "mix_logits.h"
#include "products.h"
#include "slices.h"

namespace nabla_fast::cuda {
namespace {

// Factor of e (G - c): room below 2^128 for sums over tokens that no longer count when the row is known.
constexpr float kHeadroom = 1.0f / 65536;

// Columns of a row that a block writes.
constexpr int kColumns = 4 * kThreads;

struct Scratch {
  SliceSums* slices;  // [rows, slices]
  float* logits;      // [rows, tokens of a chunk]
  float* grad;        // [rows, tokens of a chunk]
  void* weights;      // [terms, rows, 2, tokens of a chunk] of e and of e (G - c)
  float* sums;  // [rows, 2, columns of the head] what they have been summed to with the head's rows
  void* products;  // workspace of products
};

// -- kernels --------------------------------------------------------------------------------------

NABLA_FAST_DEVICE Power power_of(const RowSums& sums, const Temperature& tau) {
  return power_of(sums.status == NABLA_FAST_OK ? sums.top : kNaN, tau);
}

// How a row's weights are made when a chunk is known, and what has been summed before it moves.
struct Step {
  float top, scale;  // e = exp((z - top) / tau) scale
  float grad, mean;  // c, as the sum of two, times kHeadroom
  float factor;      // of both sums
  float shift;  // the second one's, in units of the first: what c has gone down by, times kHeadroom
};

// For every thread of the block.
NABLA_FAST_DEVICE Step step_of(const SliceSums* slices, const Chunk& chunk,
                               const Temperature& tau) {
  struct Both {
    RowSums before, now;
  };
  NABLA_FAST_SHARED(Both, row);
  NABLA_FAST_SHARED(Step, step);
  // A warp joins one of the two.
  if (warp() < 2) {
    const RowSums sums = join_slices(slices, chunk.first + (warp() == 0 ? 0 : chunk.count), tau);
    if (lane() == 0) (warp() == 0 ? row.before : row.now) = sums;
  }
  sync_block();
  if (threadIdx.x == 0) {
    const RowSums before = row.before, now = row.now;
    const Power power = power_of(now, tau);
    step.top = now.top;
    step.scale = exp2_approx(power.fraction);
    step.grad = now.grad * kHeadroom;
    step.mean = now.mean * kHeadroom;
    step.factor = power_of_two(power_of(before, tau).whole - power.whole);
    // Nothing has been summed of a row that was masked so far.
    step.shift = before.status != NABLA_FAST_OK ? 0
                                                : (before.grad * kHeadroom - step.grad) +
                                                      (before.mean * kHeadroom - step.mean);
  }
  sync_block();
  return step;
}

// Writes a thread's elements, rounded, and leaves what that has taken off them.
template <typename W>
NABLA_FAST_DEVICE void store_term(Elements& elements, const SliceOfRow& at, W* row) {
  const bool fours = lies_for_fours(row);
  NABLA_FAST_UNROLL
  for (int n = 0; n < kThreadTokens / 4; ++n) {
    const int token = at.token(n);
    Four<W> four;
    for (int k = 0; k < 4; ++k) {
      float& element = elements.of[4 * n + k];
      four.of[k] = rounded<W>(element);
      element -= to_float(four.of[k]);
    }
    store_four_within(four, row, token, at.vocab, fours);
  }
}

// A chunk's weights, and what has been summed so far moved to the row's new k and c; a block has one slice of a
// row. `next`: elements from one term to the next. (Two arrays of a slice take registers: three blocks are held.)
template <typename W, bool kNoise>
__global__ void __launch_bounds__(kThreads, kNoise ? 2 : 3)
    pull_weights_kernel(Rows<const float> logits, Noise noise, Chunk chunk, Temperature tau,
                        Rows<const float> grad, const SliceSums* slices, Rows<W> weights, int terms,
                        int64_t next, Rows<float> sums, int64_t width) {
  const SliceOfRow at(chunk);
  const Step step = step_of(slices + at.row * chunk.slices, chunk, tau);
  Elements e = load_logits<kNoise>(logits, noise, at);
  Elements tilt = load_slice(grad.row(at.row), at, 0);
  NABLA_FAST_UNROLL
  for (int n = 0; n < kThreadTokens; ++n) {
    e.of[n] = tempered_exp(e.of[n] - step.top, tau) * step.scale;
    // G may be infinite where p is 0, or will be when the whole row is known.
    const bool counts = e.of[n] > 0 && fabsf(tilt.of[n]) < kInfinity;
    tilt.of[n] = counts ? e.of[n] * (tilt.of[n] * kHeadroom - step.grad - step.mean) : 0;
  }
  for (int term = 0; term < terms; ++term) {
    W* const to = weights.row(2 * at.row) + term * next;
    store_term(e, at, to);
    store_term(tilt, at, to + weights.stride);
  }
  if (chunk.first == 0 || (step.factor == 1 && step.shift == 0)) return;
  float* const e_sums = sums.row(2 * at.row);
  float* const tilt_sums = sums.row(2 * at.row + 1);
  for (int64_t column = (at.slice - chunk.first) * kThreads + threadIdx.x; column < width;
       column += int64_t{chunk.count} * kThreads) {
    const float sum = e_sums[column];
    // What no longer counts may have been infinite.
    tilt_sums[column] =
        step.factor > 0 ? fmaf(sum, step.shift, tilt_sums[column]) * step.factor : 0;
    e_sums[column] = step.factor > 0 ? sum * step.factor : 0;
  }
}

// Writes columns of a row, and its status.
__global__ void __launch_bounds__(kThreads)
    hidden_grad_kernel(const SliceSums* slices, int count, Temperature tau, Rows<const float> sums,
                       Rows<float> result, int64_t width, int64_t blocks,
                       nabla_fast_status* status) {
  NABLA_FAST_SHARED(RowSums, shared);
  const int64_t row = blockIdx.x / blocks, first = blockIdx.x % blocks * kColumns;
  if (warp() == 0) {
    const RowSums joined = join_slices(slices + row * count, count, tau);
    if (lane() == 0) shared = joined;
  }
  sync_block();
  const RowSums joined = shared;
  const bool good = joined.status == NABLA_FAST_OK && !joined.spoiled;
  const float scale = joined.weight / (exp2_approx(power_of(joined, tau).fraction) * kHeadroom);
  const float* const tilt = sums.row(2 * row + 1);
  for (int64_t column = first + threadIdx.x; column < first + kColumns && column < width;
       column += kThreads)
    result.row(row)[column] = good ? tilt[column] * scale : kNaN;
  if (first == 0 && threadIdx.x == 0) status[row] = joined.status;
}

// -- launches -------------------------------------------------------------------------------------

// bf16 terms of a weight; 0: it is a float32.
int terms_of(const nabla_fast_mix_args& call) {
  if (call.head.dtype != NABLA_FAST_BFLOAT16) return 0;
  if (call.hidden.dtype == NABLA_FAST_FLOAT32) return 3;
  return call.hidden.dtype == NABLA_FAST_FLOAT16 ? 2 : 1;
}

int64_t weight_bytes(const nabla_fast_mix_args& call) {
  const int terms = terms_of(call);
  return terms == 0 ? int64_t{sizeof(float)} : terms * int64_t{sizeof(bfloat16)};
}

int64_t rows_at_once(const nabla_fast_mix_args& call) { return std::min(call.rows, kMostRows); }

int64_t chunk_slices(const nabla_fast_mix_args& call) {
  return slices_of_chunk(rows_at_once(call), call.vocab,
                         2 * int64_t{sizeof(float)} + 2 * weight_bytes(call));
}

int64_t stride_of_chunk(const nabla_fast_mix_args& call) {
  return chunk_stride(call, chunk_slices(call));
}

Size lay_out(const nabla_fast_mix_args& call, char* memory, Scratch& scratch) {
  const int64_t rows = rows_at_once(call);
  const Size of_chunk = Size(stride_of_chunk(call)) * rows;
  Layout layout(memory);
  scratch.slices = layout.array<SliceSums>(Size(slices_of(call.vocab)) * rows);
  scratch.logits = layout.array<float>(of_chunk);
  scratch.grad = layout.array<float>(of_chunk);
  scratch.weights = layout.array<char>(of_chunk * 2 * weight_bytes(call));
  scratch.sums = layout.array<float>(Size(call.head.width) * rows * 2);
  scratch.products = layout.product_workspace();
  return layout.bytes() + kAlignment;
}

// A part of a call's rows.
struct Part {
  const nabla_fast_mix_args& call;
  nabla_fast_cuda_stream stream;
  Scratch scratch;
  int64_t first, rows;

  MixLogits logits() const {
    return {call, first, rows, scratch.logits, stride_of_chunk(call), scratch.products};
  }

  Rows<float> grad(const Chunk& chunk) const {
    return from_token_0(scratch.grad, stride_of_chunk(call), chunk);
  }

  bool measure(const Chunk& chunk) const {
    const MixGradient gradient = {call, stream, first, rows, scratch.products};
    return logits().prepare(chunk, stream) && gradient.compute(chunk, grad(chunk)) &&
           gradient.survey(logits().of<float>(chunk), chunk, grad(chunk), scratch.slices, {});
  }

  bool weigh(const Chunk& chunk) const {
    const int64_t stride = stride_of_chunk(call);
    const Rows<float> own = grad(chunk), sums = {scratch.sums, call.head.width};
    const int terms = terms_of(call);
    const auto run = [&](auto weight) {
      using W = decltype(weight);
      return with_flag(call.noise_seed != nullptr, [&](auto noise) {
        return launch({"pull_weights_kernel", stream, rows * chunk.count, kThreads},
                      pull_weights_kernel<W, decltype(noise)::value>, logits().of<float>(chunk),
                      noise_from(call, first), chunk, Temperature(call.tau), {own.data, own.stride},
                      scratch.slices, from_token_0(static_cast<W*>(scratch.weights), stride, chunk),
                      std::max(terms, 1), 2 * rows * stride, sums, call.head.width);
      });
    };
    return terms == 0 ? run(float{}) : run(bfloat16{});
  }

  bool pull(const Chunk& chunk) const {
    const int64_t stride = stride_of_chunk(call);
    const int terms = terms_of(call);
    for (int term = 0; term < std::max(terms, 1); ++term) {
      const char* const weights = static_cast<const char*>(scratch.weights) +
                                  term * 2 * rows * stride * int64_t{sizeof(bfloat16)};
      if (!add_product({2 * rows,
                        call.head.width,
                        chunk.tokens(),
                        {weights, stride, terms == 0 ? NABLA_FAST_FLOAT32 : NABLA_FAST_BFLOAT16},
                        factor_of(call.head, call.vocab, chunk.begin()),
                        false,
                        scratch.sums,
                        call.head.width,
                        chunk.first > 0 || term > 0,
                        scratch.products,
                        product_workspace_bytes()},
                       stream))
        return false;
    }
    return true;
  }

  bool finish() const {
    // A row without columns has a status.
    const int64_t blocks = std::max<int64_t>((call.head.width + kColumns - 1) / kColumns, 1);
    return launch({"hidden_grad_kernel", stream, rows * blocks, kThreads}, hidden_grad_kernel,
                  scratch.slices, static_cast<int>(slices_of(call.vocab)), Temperature(call.tau),
                  {scratch.sums, call.head.width}, rows_from<float>(call.grad, call.rows, first),
                  call.head.width, blocks, call.row_status + first);
  }

  bool run() const {
    const auto add = [&](const Chunk& chunk) {
      return measure(chunk) && weigh(chunk) && pull(chunk);
    };
    return for_each_chunk(call.vocab, chunk_slices(call), add) && finish();
  }
};

}  // namespace

Size linear_backward_workspace(const nabla_fast_mix_args& call) {
  Scratch none;
  return lay_out(call, nullptr, none);
}

bool linear_backward(const nabla_fast_mix_args& call, nabla_fast_cuda_stream stream) {
  Scratch scratch;
  lay_out(call, aligned(call.workspace), scratch);
  return for_each_part(call.rows, rows_at_once(call), [&](int64_t first, int64_t rows) {
    return Part{call, stream, scratch, first, rows}.run();
  });
}

}  // namespace nabla_fast::cuda
