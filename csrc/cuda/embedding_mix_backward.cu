// nabla_fast_cuda_embedding_mix_backward: dz = (1 / tau) p (G - <p, G>), G = sum_t <table_t, cotangent_t>
// + direct; the gradient of given logits. (linear_embedding_mix_backward.cu has that of hidden states.)
//
// <p, G> is known when all of G has been seen. So G is kept: in the result, if that is float32. Else the
// result's memory holds 16 bits of G - c, with c the G of the slice's largest logit, and the workspace the next
// 8: 24 bits, an error of 2^-17 (G - c), and a third of the memory that would make more parts of the rows, each
// of which reads the tables. Chunk by chunk G is computed by products and, while it is still in the L2 cache,
// surveyed together with the logits for what the softmax's Jacobian needs. A last pass reads z and G and writes
// dz.

#include "call.h"
#include "exponential.h"
#include "gradient_sums.h"
#include "joins.h"
#include "launch.h"
#include "linear_embedding_mix_backward.h"
#include "mix_gradient.h"
#include "mix_logits.h"
#include "slices.h"

namespace nabla_fast::cuda {
namespace {

// Most bytes of what is left of G in a workspace.
constexpr int64_t kGradBytes = 2 * kChunkBytes;

struct Scratch {
  SliceSums* slices;  // [rows, slices]
  RowSums* sums;      // [rows]
  float* grad;        // [rows, tokens of a chunk] of a 16-bit result
  Next8* next;        // [rows, vocab] likewise
  void* products;     // workspace of products
};

// -- kernels --------------------------------------------------------------------------------------

// Joins the slices of each row; a warp has a row.
__global__ void __launch_bounds__(kThreads)
    join_kernel(Scratch scratch, int64_t rows, int slices, Temperature tau,
                nabla_fast_status* status) {
  const int64_t row = int64_t{blockIdx.x} * kWarps + warp();
  if (row >= rows) return;
  const RowSums sums = join_slices(scratch.slices + row * slices, slices, tau);
  if (lane() != 0) return;
  status[row] = sums.status;
  scratch.sums[row] = sums;
}

// `result` may be the memory of `grad`, and of `cut`.
template <typename T, bool kNoise>
__global__ void __launch_bounds__(kThreads, (kCutsHeld<T, kNoise>))
    jacobian_kernel(Rows<const T> logits, Noise noise, Chunk chunk, Temperature tau,
                    Rows<const float> grad, CutGradient cut, Scratch scratch, Rows<T> result) {
  const SliceOfRow at(chunk);
  const Elements z = load_logits<kNoise>(logits, noise, at);
  // G, or what it is above that of the slice's largest logit.
  Elements g = kCuts<T> ? cut.load(at) : load_slice(grad.row(at.row), at, 0);
  const RowSums row = scratch.sums[at.row];
  const float here = kCuts<T> ? scratch.slices[at.row * chunk.slices + at.slice].grad : 0;
  const float mean = row.spoiled ? kNaN : row.mean;
  NABLA_FAST_UNROLL
  for (int n = 0; n < kThreadTokens; ++n) {
    const float e = tempered_exp(z.of[n] - row.top, tau);
    // G may be infinite where p is 0.
    const float dz = e > 0 ? e * row.weight * (g.of[n] + (here - row.grad) - mean) : 0;
    g.of[n] = row.status == NABLA_FAST_OK ? dz : kNaN;
  }
  store_slice(g, at, result.row(at.row));
}

// -- launches -------------------------------------------------------------------------------------

// Whether the result holds G until the last pass.
bool grad_in_result(const nabla_fast_mix_args& call) {
  return call.logits.dtype == NABLA_FAST_FLOAT32;
}

// Rows of `next` begin at multiples of four of its elements.
int64_t stride_of_next(const nabla_fast_mix_args& call) {
  return Size(call.vocab).rounded_up(4).or_zero();
}

// Parts of nearly equal size.
int64_t rows_at_once(const nabla_fast_mix_args& call) {
  int64_t most = kMostRows;
  if (!grad_in_result(call)) most = std::clamp<int64_t>(kGradBytes / stride_of_next(call), 1, most);
  const int64_t parts = (call.rows + most - 1) / most;
  return (call.rows + parts - 1) / parts;
}

int64_t chunk_slices(const nabla_fast_mix_args& call) {
  return slices_of_chunk(rows_at_once(call), call.vocab, sizeof(float));
}

int64_t stride_of_chunk(const nabla_fast_mix_args& call) {
  return chunk_stride(call, chunk_slices(call));
}

Size lay_out(const nabla_fast_mix_args& call, char* memory, Scratch& scratch) {
  const int64_t rows = rows_at_once(call);
  Layout layout(memory);
  scratch = {};
  scratch.slices = layout.array<SliceSums>(Size(slices_of(call.vocab)) * rows);
  scratch.sums = layout.array<RowSums>(rows);
  if (!grad_in_result(call)) {
    scratch.grad = layout.array<float>(Size(stride_of_chunk(call)) * rows);
    scratch.next = layout.array<Next8>(Size(stride_of_next(call)) * rows);
  }
  scratch.products = layout.product_workspace();
  return layout.bytes() + kAlignment;
}

Size workspace_of(const nabla_fast_mix_args& call) {
  if (call.rows == 0) return 0;
  if (is_linear(call)) return linear_backward_workspace(call);
  Scratch none;
  return lay_out(call, nullptr, none);
}

// A part of a call's rows.
struct Part {
  const nabla_fast_mix_args& call;
  nabla_fast_cuda_stream stream;
  Scratch scratch;
  int64_t first, rows;

  MixLogits logits() const { return {call, first, rows, nullptr, 0, nullptr}; }

  // G, as rows of the vocabulary, of which a chunk is there.
  Rows<float> grad(const Chunk& chunk) const {
    if (grad_in_result(call)) return rows_from<float>(call.grad, call.rows, first);
    return from_token_0(scratch.grad, stride_of_chunk(call), chunk);
  }

  CutGradient cut() const {
    if (grad_in_result(call)) return {};
    return {rows_from<Upper16>(call.grad, call.rows, first), {scratch.next, stride_of_next(call)}};
  }

  bool measure(const Chunk& chunk) const {
    const MixGradient gradient = {call, stream, first, rows, scratch.products};
    return gradient.compute(chunk, grad(chunk)) &&
           with_element(call.logits.dtype, [&](auto element) {
             using T = decltype(element);
             return gradient.survey(logits().of<T>(chunk), chunk, grad(chunk), scratch.slices,
                                    cut());
           });
  }

  bool join() const {
    return launch({"join_kernel", stream, (rows + kWarps - 1) / kWarps, kThreads}, join_kernel,
                  scratch, rows, static_cast<int>(slices_of(call.vocab)), Temperature(call.tau),
                  call.row_status + first);
  }

  bool finish(const Chunk& chunk) const {
    return logits().with_types([&](auto element, auto noise) {
      using T = decltype(element);
      const Rows<float> own = grad(chunk);
      return launch({"jacobian_kernel", stream, rows * chunk.count, kThreads},
                    jacobian_kernel<T, decltype(noise)::value>, logits().of<T>(chunk),
                    noise_from(call, first), chunk, Temperature(call.tau), {own.data, own.stride},
                    cut(), scratch, rows_from<T>(call.grad, call.rows, first));
    });
  }

  bool run() const {
    const int64_t each = chunk_slices(call), all = slices_of(call.vocab);
    return for_each_chunk(call.vocab, each, [&](const Chunk& chunk) { return measure(chunk); }) &&
           join() &&
           for_each_chunk(call.vocab, all, [&](const Chunk& chunk) { return finish(chunk); });
  }
};

// OK, or why what the backward reads is refused.
nabla_fast_status check(const nabla_fast_mix_args& call) {
  if (const auto refused = check_mix(call)) return refused;
  if (call.rows == 0) return NABLA_FAST_OK;
  if (call.table_count > 0 && !call.cotangents) return NABLA_FAST_INVALID_POINTER;
  for (int64_t t = 0; t < call.table_count; ++t)
    if (const auto refused =
            check_device_matrix(call.cotangents[t], call.rows, call.tables[t].width))
      return refused;
  return call.direct.data ? check_device_matrix(call.direct, call.rows, call.vocab) : NABLA_FAST_OK;
}

nabla_fast_status check_grad(const nabla_fast_mix_args& call) {
  if (!call.row_status) return NABLA_FAST_INVALID_POINTER;
  if (is_linear(call)) return check_float32(call.grad, call.rows, call.head.width);
  if (const auto refused = check_device_matrix(call.grad, call.rows, call.vocab)) return refused;
  return call.grad.dtype == call.logits.dtype ? NABLA_FAST_OK : NABLA_FAST_UNKNOWN_DTYPE;
}

}  // namespace
}  // namespace nabla_fast::cuda

using namespace nabla_fast;
using namespace nabla_fast::cuda;

int64_t nabla_fast_cuda_embedding_mix_backward_workspace(const nabla_fast_mix_args* args) {
  return workspace_bytes(args, check, workspace_of);
}

nabla_fast_status nabla_fast_cuda_embedding_mix_backward(const nabla_fast_mix_args* args,
                                                         nabla_fast_cuda_stream stream) {
  nabla_fast_mix_args call;
  if (const auto refused = read_args(args, call)) return refused;
  if (const auto refused = check(call)) return refused;
  if (call.rows == 0) return NABLA_FAST_OK;
  if (const auto refused = check_grad(call)) return refused;
  const int64_t bytes = workspace_of(call).or_zero();
  if (const auto refused = check_workspace(call, bytes)) return refused;
  const bool overlap = any_overlap([&](auto& arrays) {
    arrays.writes(array_of(call.grad, call.rows));
    arrays.writes(array_of(call.row_status, call.rows));
    arrays.writes(array_of_bytes(call.workspace, bytes));
    list_mix_inputs(call, arrays);
    for (int64_t t = 0; t < call.table_count; ++t)
      arrays.reads(array_of(call.cotangents[t], call.rows));
    if (call.direct.data) arrays.reads(array_of(call.direct, call.rows));
  });
  if (overlap) return NABLA_FAST_OVERLAP;
  if (is_linear(call)) return answer(linear_backward(call, stream));
  Scratch scratch;
  lay_out(call, aligned(call.workspace), scratch);
  const bool done = for_each_part(call.rows, rows_at_once(call), [&](int64_t first, int64_t rows) {
    return Part{call, stream, scratch, first, rows}.run();
  });
  return answer(done);
}
