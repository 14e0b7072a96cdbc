// nabla_fast_cuda_embedding_mix: products of relaxed one-hot rows with tables.
//
// Logits are given, or a product of hidden states with a head makes a chunk of them at a time.
//
// Hard: the largest logit of each slice, joined over a row, and rows of the tables gathered. Soft, for
// chunks of the vocabulary that stay in the L2 cache: a chunk's weights exp(z / tau) 2^-k are written
// once, in the dtype of a table and times a constant power of two, and a product takes them to the
// table's rows. k = ceil(max z / (tau ln 2)) over the chunks so far: where it grows, what has been
// summed is multiplied by a power of two, which is exact. A mix is divided by the sum of the weights as
// they were rounded: rounding shifts it within the span of the table's rows and does not scale it.

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

// Dtypes of tables, each of which has weights of its own.
constexpr int kDtypes = 3;

// Columns of a row that a block writes.
constexpr int kColumns = 4 * kThreads;

int64_t column_blocks(int64_t width) { return (width + kColumns - 1) / kColumns; }

// What a part of the rows needs beside its inputs and results.
struct Scratch {
  RowTops tops;
  int* token;        // [rows] the hard token, where the status is OK
  double* power;     // [rows, slices] the k of each slice's weights
  float* slice_sum;  // [kDtypes, rows, slices] of rounded weights
  float* sum;        // [kDtypes, rows] of the same, times 2^(k - the row's last k)
  float* mixed;      // [rows, width of all tables]
  void* weights;     // [rows, tokens of a chunk]
  float* logits;     // [rows, tokens of a chunk], of hidden states
  void* products;    // workspace of products
};

// -- kernels --------------------------------------------------------------------------------------

// Factor of weights. Those of at most 1 reach float16's subnormal numbers early, and the small ones of
// a flat row add up. Sums of up to 2^20 others stay as finite as the tables are.
template <typename W>
NABLA_FAST_DEVICE float weights_power() {
  return -20;
}
template <>
NABLA_FAST_DEVICE float weights_power<float16>() {
  return 15;
}

// The largest logits of a row that are numbers: before a chunk, and up to its end.
struct RunningTops {
  float before, now;
};
NABLA_FAST_DEVICE RunningTops shuffle_xor(RunningTops tops, unsigned lanes) {
  return {cuda::shuffle_xor(tops.before, lanes), cuda::shuffle_xor(tops.now, lanes)};
}
struct LargestOfBoth {
  NABLA_FAST_DEVICE RunningTops operator()(RunningTops a, RunningTops b) const {
    return {fmaxf(a.before, b.before), fmaxf(a.now, b.now)};
  }
};

NABLA_FAST_DEVICE RunningTops running_tops(const float* tops, const Chunk& chunk) {
  RunningTops row = {-kInfinity, -kInfinity};
  for (int slice = static_cast<int>(threadIdx.x); slice < chunk.first + chunk.count;
       slice += kThreads) {
    row.now = fmaxf(row.now, tops[slice]);
    if (slice < chunk.first) row.before = row.now;
  }
  return join_block(row, LargestOfBoth{});
}

// A chunk's weights; a block has one slice of a row. `mixed` is rescaled by the blocks of its row
// together, where it is not null.
template <typename T, typename W, bool kNoise>
__global__ void __launch_bounds__(kThreads, kBlocksHeld<kNoise>)
    weights_kernel(Rows<const T> logits, Noise noise, Chunk chunk, Temperature tau, RowTops tops,
                   Rows<W> weights, float* slice_sum, double* slice_power, Rows<float> mixed,
                   int64_t width) {
  const SliceOfRow at(chunk);
  const RunningTops tops_of_row = running_tops(tops.value + at.row * chunk.slices, chunk);
  const Power power = power_of(tops_of_row.now, tau);
  const float reference = power.whole == kNoPower ? 0 : tops_of_row.now;
  const float shift = power.fraction + weights_power<W>();
  Elements z = load_logits<kNoise>(logits, noise, at);
  float sum = 0;
  NABLA_FAST_UNROLL
  for (int n = 0; n < kThreadTokens; ++n) {
    const float difference = z.of[n] - reference;
    // The approximation is exact enough for what is rounded at once.
    const float weight = sizeof(W) == 4 ? tempered_exp(difference, tau) * exp2_approx(shift)
                                        : exp2_approx(fmaf(difference, tau.high, shift));
    z.of[n] = to_float(rounded<W>(weight));
    sum += z.of[n];
  }
  store_slice(z, at, weights.row(at.row) - chunk.first * kSliceTokens);
  sum = join_block(sum, Sum{});
  if (threadIdx.x == 0) {
    slice_sum[at.row * chunk.slices + at.slice] = sum;
    slice_power[at.row * chunk.slices + at.slice] = power.whole;
  }
  if (!mixed.data) return;
  const float factor = power_of_two(power_of(tops_of_row.before, tau).whole - power.whole);
  if (factor == 1) return;
  float* const row = mixed.row(at.row);
  for (int64_t column = (at.slice - chunk.first) * kThreads + threadIdx.x; column < width;
       column += int64_t{chunk.count} * kThreads)
    row[column] *= factor;
}

// Status and token of each row; of soft mixes the sums of weights of the dtypes whose bits are set in
// `dtypes`. A warp has a row.
__global__ void __launch_bounds__(kThreads)
    rows_kernel(Scratch scratch, int64_t rows, int slices, unsigned dtypes,
                nabla_fast_status* status) {
  const int64_t row = int64_t{blockIdx.x} * kWarps + warp();
  if (row >= rows) return;
  const RowTops& tops = scratch.tops;
  const RowTop joined = top_of_row(slices, [&](int n) {
    return Top{tops.value[row * slices + n], tops.token[row * slices + n]};
  });
  if (lane() == 0) {
    scratch.token[row] = joined.top.token;
    status[row] = joined.status;
  }
  const double* const power = scratch.power + row * slices;
  for (int dtype = 0; dtype < kDtypes; ++dtype) {
    if (!(dtypes >> dtype & 1)) continue;
    const float* const sums = scratch.slice_sum + (dtype * rows + row) * slices;
    double sum = 0;
    for (int slice = lane(); slice < slices; slice += static_cast<int>(kWarpThreads))
      sum += double{sums[slice]} * power_of_two(power[slice] - power[slices - 1]);
    sum = join_warp(sum, Sum{});
    if (lane() == 0) scratch.sum[dtype * rows + row] = static_cast<float>(sum);
  }
}

// Writes columns of a row: mixes of a row that is OK, else NaN.
template <typename Out, typename Mix>
NABLA_FAST_DEVICE void write_columns(Rows<Out> mixes, int64_t width, int64_t blocks,
                                     const nabla_fast_status* status, const Mix& mix) {
  const int64_t row = blockIdx.x / blocks, first = blockIdx.x % blocks * kColumns;
  const bool good = status[row] == NABLA_FAST_OK;
  for (int64_t column = first + threadIdx.x; column < first + kColumns && column < width;
       column += kThreads)
    mixes.row(row)[column] = rounded<Out>(good ? mix(row, column) : kNaN);
}

template <typename T, typename Out>
__global__ void __launch_bounds__(kThreads)
    gather_kernel(Rows<const T> table, const int* token, Rows<Out> mixes, int64_t width,
                  int64_t blocks, const nabla_fast_status* status) {
  write_columns(mixes, width, blocks, status, [&](int64_t row, int64_t column) {
    return to_float(table.row(token[row])[column]);
  });
}

template <typename Out>
__global__ void __launch_bounds__(kThreads)
    divide_kernel(Rows<const float> mixed, const float* sum, Rows<Out> mixes, int64_t width,
                  int64_t blocks, const nabla_fast_status* status) {
  write_columns(mixes, width, blocks, status,
                [&](int64_t row, int64_t column) { return mixed.row(row)[column] / sum[row]; });
}

// -- launches -------------------------------------------------------------------------------------

int64_t tables_width(const nabla_fast_mix_args& call) {
  int64_t width = 0;
  for (int64_t t = 0; t < call.table_count; ++t) width += call.tables[t].width;
  return width;
}

// A bit for each dtype.
unsigned dtypes_of_weights(const nabla_fast_mix_args& call) {
  unsigned dtypes = 0;
  for (int64_t t = 0; t < call.table_count && !call.hard; ++t) dtypes |= 1u << call.tables[t].dtype;
  return dtypes;
}

int64_t rows_at_once(const nabla_fast_mix_args& call) { return std::min(call.rows, kMostRows); }

// Bytes of a weight, in the widest dtype of a table; 0 where there are none.
int64_t weight_bytes(const nabla_fast_mix_args& call) {
  int64_t bytes = 0;
  for (int64_t t = 0; t < call.table_count && !call.hard; ++t)
    bytes = std::max<int64_t>(bytes, bytes_of(call.tables[t].dtype));
  return bytes;
}

int64_t chunk_slices(const nabla_fast_mix_args& call) {
  const int64_t token_bytes = weight_bytes(call) + (is_linear(call) ? sizeof(float) : 0);
  // Of given logits without weights there is nothing but their tops.
  if (token_bytes == 0) return slices_of(call.vocab);
  return slices_of_chunk(rows_at_once(call), call.vocab, token_bytes);
}

int64_t stride_of_chunk(const nabla_fast_mix_args& call) {
  return chunk_stride(call, chunk_slices(call));
}

// Sums of widths beyond any address space are no size.
Size lay_out(const nabla_fast_mix_args& call, char* memory, Scratch& scratch) {
  const int64_t rows = rows_at_once(call);
  const Size of_slices = Size(slices_of(call.vocab)) * rows;
  Layout layout(memory);
  scratch = {};
  scratch.tops = {layout.array<float>(of_slices), layout.array<int>(of_slices)};
  scratch.token = layout.array<int>(rows);
  if (!call.hard) {
    Size width = 0;
    for (int64_t t = 0; t < call.table_count; ++t) width = width + call.tables[t].width;
    scratch.power = layout.array<double>(of_slices);
    scratch.slice_sum = layout.array<float>(of_slices * kDtypes);
    scratch.sum = layout.array<float>(Size(rows) * kDtypes);
    scratch.mixed = layout.array<float>(width * rows);
    scratch.weights = layout.array<char>(Size(stride_of_chunk(call)) * rows * weight_bytes(call));
  }
  if (is_linear(call)) scratch.logits = layout.array<float>(Size(stride_of_chunk(call)) * rows);
  if (is_linear(call) || !call.hard) scratch.products = layout.product_workspace();
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

  bool measure(const Chunk& chunk) const {
    return logits().prepare(chunk, stream) && logits().with_types([&](auto element, auto noise) {
      using T = decltype(element);
      return launch({"tops_kernel", stream, rows * chunk.count, kThreads},
                    tops_kernel<T, decltype(noise)::value>, logits().of<T>(chunk),
                    noise_from(call, first), chunk, scratch.tops);
    });
  }

  // The weights for tables of a dtype; `rescale`: what is mixed so far.
  bool weigh(const Chunk& chunk, nabla_fast_dtype dtype, bool rescale) const {
    const int64_t width = tables_width(call);
    const Rows<float> mixed = {rescale ? scratch.mixed : nullptr, width};
    return logits().with_types([&](auto element, auto noise) {
      return with_element(dtype, [&](auto weight) {
        using T = decltype(element);
        using W = decltype(weight);
        return launch({"weights_kernel", stream, rows * chunk.count, kThreads},
                      weights_kernel<T, W, decltype(noise)::value>, logits().of<T>(chunk),
                      noise_from(call, first), chunk, Temperature(call.tau), scratch.tops,
                      {static_cast<W*>(scratch.weights), stride_of_chunk(call)},
                      scratch.slice_sum + dtype * rows * chunk.slices, scratch.power, mixed, width);
      });
    });
  }

  // Adds a chunk of the tables of a dtype.
  bool mix(const Chunk& chunk, nabla_fast_dtype dtype) const {
    int64_t column = 0;
    for (int64_t t = 0; t < call.table_count; ++t) {
      const nabla_fast_matrix& table = call.tables[t];
      if (table.dtype == dtype && !add_product({rows,
                                                table.width,
                                                chunk.tokens(),
                                                {scratch.weights, stride_of_chunk(call), dtype},
                                                factor_of(table, call.vocab, chunk.begin()),
                                                false,
                                                scratch.mixed + column,
                                                tables_width(call),
                                                chunk.first > 0,
                                                scratch.products,
                                                product_workspace_bytes()},
                                               stream))
        return false;
      column += table.width;
    }
    return true;
  }

  // Whether the tops of all chunks are taken before the first: where a chunk of given logits has no room in
  // the L2 cache, and is read from memory twice in any case, one launch takes the place of many.
  bool measures_all() const {
    return !is_linear(call) && chunk_slices(call) < slices_of(call.vocab) &&
           rows * stride_of_chunk(call) * bytes_of(call.logits.dtype) > kChunkBytes;
  }

  bool add(const Chunk& chunk) const {
    if (!measures_all() && !measure(chunk)) return false;
    bool rescale = chunk.first > 0;
    for (nabla_fast_dtype dtype = 0; dtype < kDtypes; ++dtype) {
      if (!(dtypes_of_weights(call) >> dtype & 1)) continue;
      if (!weigh(chunk, dtype, rescale) || !mix(chunk, dtype)) return false;
      rescale = false;
    }
    return true;
  }

  bool finish_rows() const {
    return launch({"rows_kernel", stream, (rows + kWarps - 1) / kWarps, kThreads}, rows_kernel,
                  scratch, rows, static_cast<int>(slices_of(call.vocab)), dtypes_of_weights(call),
                  call.row_status + first);
  }

  bool gather(const nabla_fast_matrix& table, const nabla_fast_output& mixes) const {
    const int64_t blocks = column_blocks(table.width);
    return with_element(table.dtype, [&](auto element) {
      return with_element(mixes.dtype, [&](auto result) {
        using T = decltype(element);
        using Out = decltype(result);
        return launch({"gather_kernel", stream, rows * blocks, kThreads}, gather_kernel<T, Out>,
                      rows_from<T>(table, call.vocab, 0), scratch.token,
                      rows_from<Out>(mixes, call.rows, first), table.width, blocks,
                      call.row_status + first);
      });
    });
  }

  bool divide(int64_t column, const nabla_fast_matrix& table,
              const nabla_fast_output& mixes) const {
    const int64_t blocks = column_blocks(table.width);
    return with_element(mixes.dtype, [&](auto result) {
      using Out = decltype(result);
      return launch({"divide_kernel", stream, rows * blocks, kThreads}, divide_kernel<Out>,
                    {scratch.mixed + column, tables_width(call)}, scratch.sum + table.dtype * rows,
                    rows_from<Out>(mixes, call.rows, first), table.width, blocks,
                    call.row_status + first);
    });
  }

  bool run() const {
    const auto take = [&](const Chunk& chunk) { return call.hard ? measure(chunk) : add(chunk); };
    const auto slices = static_cast<int>(slices_of(call.vocab));
    if (measures_all() && !call.hard && !measure({0, slices, slices, static_cast<int>(call.vocab)}))
      return false;
    if (!for_each_chunk(call.vocab, chunk_slices(call), take) || !finish_rows()) return false;
    int64_t column = 0;
    for (int64_t t = 0; t < call.table_count; ++t) {
      const nabla_fast_matrix& table = call.tables[t];
      if (!(call.hard ? gather(table, call.mixes[t]) : divide(column, table, call.mixes[t])))
        return false;
      column += table.width;
    }
    return true;
  }
};

nabla_fast_status check_mixes(const nabla_fast_mix_args& call) {
  if (call.table_count > 0 && !call.mixes) return NABLA_FAST_INVALID_POINTER;
  for (int64_t t = 0; t < call.table_count; ++t)
    if (const auto refused = check_device_matrix(call.mixes[t], call.rows, call.tables[t].width))
      return refused;
  return call.row_status ? NABLA_FAST_OK : NABLA_FAST_INVALID_POINTER;
}

}  // namespace
}  // namespace nabla_fast::cuda

using namespace nabla_fast;
using namespace nabla_fast::cuda;

int64_t nabla_fast_cuda_embedding_mix_workspace(const nabla_fast_mix_args* args) {
  return workspace_bytes(args, check_mix, workspace_of);
}

nabla_fast_status nabla_fast_cuda_embedding_mix(const nabla_fast_mix_args* args,
                                                nabla_fast_cuda_stream stream) {
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
    list_mix_inputs(call, arrays);
  });
  if (overlap) return NABLA_FAST_OVERLAP;
  Scratch scratch;
  lay_out(call, aligned(call.workspace), scratch);
  const bool done = for_each_part(call.rows, rows_at_once(call), [&](int64_t first, int64_t rows) {
    return Part{call, stream, scratch, first, rows}.run();
  });
  return answer(done);
}
