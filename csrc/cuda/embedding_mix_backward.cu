// nabla_fast_cuda_embedding_mix_backward: dz = (1 / tau) p (G - <p, G>), G = sum_t <table_t, cotangent_t>
// + direct.
//
// <p, G> is known when all of G has been seen. So G is kept in float32: in the result, if that is
// float32, else in the workspace. Chunk by chunk it is computed by products and, while it is still in
// the L2 cache, surveyed together with the logits for what the softmax's Jacobian needs: the largest z
// with its token, S = sum exp((z - max) / tau), and T = sum exp((z - max) / tau) (G - G[token]). A slice
// takes its sums relative to its own largest z and to the G found there; both move to the row's by
// arithmetic on a few numbers. A last pass reads z and G and writes dz.
//
// Of hidden states nothing of [rows, vocabulary] exists: a chunk of z and of G is made by products in both
// passes, and dz times the head is added up in the second. Before a bf16 head dz is split into bf16 terms, for
// the matrix units: two, whose sum is it to 2^-17, where hidden states are rounded more, else three.

#include "call.h"
#include "exponential.h"
#include "joins.h"
#include "launch.h"
#include "mix_logits.h"
#include "products.h"
#include "row_tops.h"
#include "slices.h"

namespace nabla_fast::cuda {
namespace {

// Most bytes of G in a workspace.
constexpr int64_t kGradBytes = int64_t{64} << 20;

struct SliceSums {
  float top;   // the largest z, NaN if a logit is
  int token;   // of the largest z, the first of equal ones
  float sum;   // S
  float tilt;  // T, where G is finite
  float grad;  // G of the token; 0 where that is not finite
  float lost;  // the largest z at which G is not finite
};

struct RowSums {
  float top;     // the largest z
  float grad;    // G of its token
  float weight;  // 1 / (S tau)
  float
      mean;  // T / S = <p, G> - G[token]; NaN where G is not finite at a token of some probability
};

struct Scratch {
  SliceSums* slices;  // [rows, slices]
  RowSums* sums;      // [rows]
  float* grad;    // [rows, vocab], unless the result is float32; of hidden states a chunk's tokens
  float* logits;  // [rows, tokens of a chunk], of hidden states
  bfloat16* terms;  // [2, rows, tokens of a chunk] dz, before a bf16 head
  void* products;   // workspace of products
};

// -- kernels --------------------------------------------------------------------------------------

// Begins G: with `direct`, or with zeros where it has no data.
template <typename D>
__global__ void __launch_bounds__(kThreads)
    begin_kernel(Rows<const D> direct, Chunk chunk, Rows<float> grad) {
  const SliceOfRow at(chunk);
  Elements elements = {};
  if (direct.data) elements = load_slice(direct.row(at.row), at, 0);
  store_slice(elements, at, grad.row(at.row));
}

template <typename T, bool kNoise>
__global__ void __launch_bounds__(kThreads, kBlocksHeld<kNoise>)
    survey_kernel(Rows<const T> logits, Noise noise, Chunk chunk, Temperature tau,
                  Rows<const float> grad, SliceSums* sums) {
  const SliceOfRow at(chunk);
  const Elements z = load_logits<kNoise>(logits, noise, at);
  const Elements g = load_slice(grad.row(at.row), at, 0);
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
    sum += e;
    if (fabsf(g.of[n]) < kInfinity) tilt += e * (g.of[n] - here);
  }
  sum = join_block(sum, Sum{});
  tilt = join_block(tilt, Sum{});
  if (threadIdx.x == 0)
    sums[at.row * chunk.slices + at.slice] = {
        found.nan ? kNaN : found.top.value, found.top.token, sum, tilt, here, lost};
}

// Joins the slices of each row; a warp has a row.
__global__ void __launch_bounds__(kThreads)
    join_kernel(Scratch scratch, int64_t rows, int slices, Temperature tau,
                nabla_fast_status* status) {
  const int64_t row = int64_t{blockIdx.x} * kWarps + warp();
  if (row >= rows) return;
  const SliceSums* const parts = scratch.slices + row * slices;
  const int step = static_cast<int>(kWarpThreads);
  const RowTop found = top_of_row(slices, [&](int n) { return Top{parts[n].top, parts[n].token}; });
  const float reference = found.status == NABLA_FAST_OK ? found.top.value : 0;
  float grad = 0;
  for (int n = lane(); n < slices; n += step)
    if (parts[n].token == found.top.token) grad = parts[n].grad;
  grad = join_warp(grad, Sum{});
  double sum = 0, tilt = 0;
  bool spoiled = false;
  for (int n = lane(); n < slices; n += step) {
    const SliceSums part = parts[n];
    const float share = tempered_exp(part.top - reference, tau);
    sum += double{share} * part.sum;
    if (share > 0) tilt += double{share} * (part.tilt + part.sum * (part.grad - grad));
    spoiled = spoiled || tempered_exp(part.lost - reference, tau) > 0;
  }
  sum = join_warp(sum, Sum{});
  tilt = join_warp(tilt, Sum{});
  spoiled = any_of_warp(spoiled);
  if (lane() != 0) return;
  status[row] = found.status;
  scratch.sums[row] = {reference, grad, static_cast<float>(tau.inverse / sum),
                       spoiled ? kNaN : static_cast<float>(tilt / sum)};
}

// `result` may be the memory of `grad`.
template <typename T, bool kNoise>
__global__ void __launch_bounds__(kThreads, kBlocksHeld<kNoise>)
    jacobian_kernel(Rows<const T> logits, Noise noise, Chunk chunk, Temperature tau,
                    Rows<const float> grad, const RowSums* sums, const nabla_fast_status* status,
                    Rows<T> result) {
  const SliceOfRow at(chunk);
  const Elements z = load_logits<kNoise>(logits, noise, at);
  Elements g = load_slice(grad.row(at.row), at, 0);
  const RowSums row = sums[at.row];
  const bool good = status[at.row] == NABLA_FAST_OK;
  NABLA_FAST_UNROLL
  for (int n = 0; n < kThreadTokens; ++n) {
    const float e = tempered_exp(z.of[n] - row.top, tau);
    // G may be infinite where p is 0.
    const float dz = e > 0 ? e * row.weight * (g.of[n] - row.grad - row.mean) : 0;
    g.of[n] = good ? dz : kNaN;
  }
  store_slice(g, at, result.row(at.row));
}

// The bf16 terms of a chunk's dz, the largest first; `next`: elements from one to the next.
__global__ void __launch_bounds__(kThreads)
    split_kernel(Rows<const float> dz, Chunk chunk, Rows<bfloat16> terms, int64_t next, int count) {
  const SliceOfRow at(chunk);
  Elements elements = load_slice(dz.row(at.row), at, 0);
  for (int term = 0; term < count; ++term) {
    store_slice(elements, at, terms.row(at.row) + term * next);
    NABLA_FAST_UNROLL
    for (int n = 0; n < kThreadTokens; ++n)
      elements.of[n] -= to_float(rounded<bfloat16>(elements.of[n]));
  }
}

// -- launches -------------------------------------------------------------------------------------

// Whether the result holds G until the last pass.
bool grad_in_result(const nabla_fast_mix_args& call) {
  return !is_linear(call) && call.logits.dtype == NABLA_FAST_FLOAT32;
}

// bf16 terms of dz; 0: it stays as it is.
int terms_of(const nabla_fast_mix_args& call) {
  if (!is_linear(call) || call.head.dtype != NABLA_FAST_BFLOAT16) return 0;
  return call.hidden.dtype == NABLA_FAST_FLOAT32 ? 3 : 2;
}

int64_t rows_at_once(const nabla_fast_mix_args& call) {
  int64_t most = kMostRows;
  if (!grad_in_result(call) && !is_linear(call))
    most = std::clamp<int64_t>(kGradBytes / (call.vocab * int64_t{sizeof(float)}), 1, most);
  return std::min(call.rows, most);
}

int64_t chunk_slices(const nabla_fast_mix_args& call) {
  const int64_t token_bytes =
      (1 + is_linear(call)) * int64_t{sizeof(float)} + terms_of(call) * int64_t{sizeof(bfloat16)};
  return slices_of_chunk(rows_at_once(call), call.vocab, token_bytes);
}

int64_t stride_of_chunk(const nabla_fast_mix_args& call) {
  return chunk_stride(call, chunk_slices(call));
}

Size lay_out(const nabla_fast_mix_args& call, char* memory, Scratch& scratch) {
  const int64_t rows = rows_at_once(call);
  const Size of_chunk = Size(stride_of_chunk(call)) * rows;
  Layout layout(memory);
  scratch = {};
  scratch.slices = layout.array<SliceSums>(Size(slices_of(call.vocab)) * rows);
  scratch.sums = layout.array<RowSums>(rows);
  if (is_linear(call)) {
    scratch.grad = layout.array<float>(of_chunk);
    scratch.logits = layout.array<float>(of_chunk);
  } else if (!grad_in_result(call)) {
    scratch.grad = layout.array<float>(Size(call.vocab) * rows);
  }
  scratch.terms = layout.array<bfloat16>(of_chunk * terms_of(call));
  scratch.products = layout.product_workspace();
  return layout.bytes() + kAlignment;
}

Size workspace_of(const nabla_fast_mix_args& call) {
  if (call.rows == 0) return 0;
  Scratch none;
  return lay_out(call, nullptr, none);
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

  // G, as rows of the vocabulary, of which a chunk is there.
  Rows<float> grad(const Chunk& chunk) const {
    if (grad_in_result(call)) return rows_from<float>(call.grad, call.rows, first);
    if (is_linear(call)) return from_token_0(scratch.grad, stride_of_chunk(call), chunk);
    return {scratch.grad, call.vocab};
  }
  Rows<const float> known_grad(const Chunk& chunk) const {
    return {grad(chunk).data, grad(chunk).stride};
  }

  bool begin(const Chunk& chunk) const {
    // Products write G where it does not begin with anything.
    if (!call.direct.data && call.table_count > 0) return true;
    const nabla_fast_matrix none = {nullptr, 0, 0, NABLA_FAST_FLOAT32};
    const nabla_fast_matrix& direct = call.direct.data ? call.direct : none;
    return with_element(direct.dtype, [&](auto element) {
      using D = decltype(element);
      const Rows<const D> from =
          direct.data ? rows_from<D>(direct, call.rows, first) : Rows<const D>{nullptr, 0};
      return launch({"begin_kernel", stream, rows * chunk.count, kThreads}, begin_kernel<D>, from,
                    chunk, grad(chunk));
    });
  }

  bool multiply(const Chunk& chunk) const {
    bool keep = call.direct.data != nullptr;
    for (int64_t t = 0; t < call.table_count; ++t) {
      const nabla_fast_matrix& table = call.tables[t];
      if (!add_product(
              {rows, chunk.tokens(), table.width, factor_of(call.cotangents[t], call.rows, first),
               factor_of(table, call.vocab, chunk.begin()), true, grad(chunk).data + chunk.begin(),
               grad(chunk).stride, keep, scratch.products, product_workspace_bytes()},
              stream))
        return false;
      keep = true;
    }
    return true;
  }

  bool survey(const Chunk& chunk) const {
    return logits().with_types([&](auto element, auto noise) {
      using T = decltype(element);
      return launch({"survey_kernel", stream, rows * chunk.count, kThreads},
                    survey_kernel<T, decltype(noise)::value>, logits().of<T>(chunk),
                    noise_from(call, first), chunk, Temperature(call.tau), known_grad(chunk),
                    scratch.slices);
    });
  }

  bool join() const {
    return launch({"join_kernel", stream, (rows + kWarps - 1) / kWarps, kThreads}, join_kernel,
                  scratch, rows, static_cast<int>(slices_of(call.vocab)), Temperature(call.tau),
                  call.row_status + first);
  }

  // dz of a chunk: of given logits the result, else in the place of G.
  bool finish(const Chunk& chunk) const {
    return logits().with_types([&](auto element, auto noise) {
      using T = decltype(element);
      const Rows<float> own = grad(chunk);
      const Rows<T> result = is_linear(call) ? Rows<T>{reinterpret_cast<T*>(own.data), own.stride}
                                             : rows_from<T>(call.grad, call.rows, first);
      return launch({"jacobian_kernel", stream, rows * chunk.count, kThreads},
                    jacobian_kernel<T, decltype(noise)::value>, logits().of<T>(chunk),
                    noise_from(call, first), chunk, Temperature(call.tau), known_grad(chunk),
                    scratch.sums, call.row_status + first, result);
    });
  }

  // Adds a chunk's dz times the head to the result.
  bool pull(const Chunk& chunk) const {
    const int64_t stride = stride_of_chunk(call);
    const Rows<float> result = rows_from<float>(call.grad, call.rows, first);
    const auto add = [&](const void* left, nabla_fast_dtype dtype, bool keep) {
      return add_product({rows,
                          call.head.width,
                          chunk.tokens(),
                          {left, stride, dtype},
                          factor_of(call.head, call.vocab, chunk.begin()),
                          false,
                          result.data,
                          result.stride,
                          keep,
                          scratch.products,
                          product_workspace_bytes()},
                         stream);
    };
    bool keep = chunk.first > 0;
    const int terms = terms_of(call);
    if (terms == 0) return add(scratch.grad, NABLA_FAST_FLOAT32, keep);
    if (!launch({"split_kernel", stream, rows * chunk.count, kThreads}, split_kernel,
                known_grad(chunk), chunk, from_token_0(scratch.terms, stride, chunk), rows * stride,
                terms))
      return false;
    for (int term = 0; term < terms; ++term, keep = true)
      if (!add(scratch.terms + term * rows * stride, NABLA_FAST_BFLOAT16, keep)) return false;
    return true;
  }

  bool run() const {
    const auto gradient = [&](const Chunk& chunk) {
      return logits().prepare(chunk, stream) && begin(chunk) && multiply(chunk);
    };
    const auto measure = [&](const Chunk& chunk) { return gradient(chunk) && survey(chunk); };
    const auto write = [&](const Chunk& chunk) {
      return is_linear(call) ? gradient(chunk) && finish(chunk) && pull(chunk) : finish(chunk);
    };
    const int64_t each = chunk_slices(call), all = slices_of(call.vocab);
    return for_each_chunk(call.vocab, each, measure) && join() &&
           for_each_chunk(call.vocab, is_linear(call) ? each : all, write);
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
  Scratch scratch;
  lay_out(call, aligned(call.workspace), scratch);
  const bool done = for_each_part(call.rows, rows_at_once(call), [&](int64_t first, int64_t rows) {
    return Part{call, stream, scratch, first, rows}.run();
  });
  return answer(done);
}
