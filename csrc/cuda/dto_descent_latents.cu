// nabla_fast_cuda_dto_descent_latents: one pass over the head a step, for few rows at a time.
//
// A cooperative grid keeps a row's tokens apart: a block has the same tokens in every pass, and reads
// their rows of the head once, a tile of up to 16 tokens at a time, into shared memory. From there a tile
// is read twice. Threads share its columns: they multiply them with h, whose sums make the tile's logits;
// a warp for each row turns these into weights; then the threads add the tile's rows, weighted, to sums
// that stay in registers for the whole pass. K steps take K + 1 passes, the last for the tokens alone.
//
// With c = G[token] the gradient of h is 1/(S tau) (sum e (G - c) w - T/S sum e w), S = sum e, T = sum e
// (G - c). A block's sums are relative to its own largest y and the G of that token, which is what keeps
// small gradients of peaked rows; what blocks have found is joined in their order. Every block joins the
// numbers of a row for itself, and so knows whether the row goes on; the columns of h are shared, each
// moved by one block.
//
// While blocks wait for each other the next tiles come: a pass begins with those of the one before it.

#include <algorithm>

#include "adam.h"
#include "call.h"
#include "descent_row.h"
#include "descent_rows.h"
#include "descent_team.h"
#include "device_limits.h"
#include "exponential.h"
#include "gumbel.h"
#include "head_tiles.h"
#include "joins.h"
#include "latents_columns.h"
#include "latents_tokens.h"
#include "launch.h"
#include "nabla_fast_cuda.h"
#include "slices.h"

namespace nabla_fast::cuda {
namespace {

// Columns of a thread, of a row of the usual width and of a wide one: registers have room for the sums of
// kMostLatentsRows rows, or of one.
constexpr int kColumns = 8, kWideColumns = 16;
constexpr int kMostLatentsRows = 4;
constexpr int kUsualWidth = kColumns * kDescentThreads;
constexpr int kMostWidth = kWideColumns * kDescentThreads;
// Bytes that dynamic shared memory may begin after the kernel's variables.
constexpr int64_t kSharedAlignment = 128;
// Columns that a block moves at a time.
constexpr int kStrip = static_cast<int>(kWarpThreads);

// What steps change.
struct LatentsState {
  Rows<float> h, exp_avg, exp_avg_sq;
};

// Arguments of all rows.
struct Latents {
  DescentRows rows;
  LatentsState state;
  Rows<const float> grad;
  Noise noise;
  int vocab, width;
  Temperature tau;
};

// How blocks share the tokens of a launch.
struct LatentsSharing {
  int blocks;
  int block_tokens;  // a multiple of 4
  TileSharing tiles;
  int warps;           // that have columns
  int product_stride;  // products of a warp, or columns of a strip
};

// Memory of a launch.
struct LatentsScratch {
  int64_t* flip_after;
  float* sums;       // [blocks, rows, 2, sums_pitch]
  BlockPart* parts;  // [blocks, rows]
  float* noise;      // [rows, noise_pitch], or null
  float* copies;     // [3, rows, sums_pitch] state where steps are only counted, or null
  int64_t sums_pitch, noise_pitch;
};

// What all blocks know of a row of the launch.
struct LatentsRow {
  // Of its next step.
  float top, centre, weight, mean;
  AdamRate adam;
  // Of its course.
  int64_t before, most, taken;  // steps; -1 are taken before its token is known
  int32_t token, flipped, finished;
  nabla_fast_status status;
};

template <int kRows>
struct LatentsRows {
  LatentsRow of[kRows];
};

template <int kRows>
struct TileChanges {
  TileChange of[kRows];
};

// -- kernel ---------------------------------------------------------------------------------------

// Copies some rows.
NABLA_FAST_DEVICE void copy_rows(const LatentsState& from, const LatentsState& to,
                                 int64_t first_row, int rows, int width) {
  for (int64_t n = int64_t{blockIdx.x} * kDescentThreads + threadIdx.x; n < int64_t{rows} * width;
       n += int64_t{gridDim.x} * kDescentThreads) {
    const int64_t row = first_row + n / width, column = n % width;
    to.h.row(row)[column] = from.h.row(row)[column];
    to.exp_avg.row(row)[column] = from.exp_avg.row(row)[column];
    to.exp_avg_sq.row(row)[column] = from.exp_avg_sq.row(row)[column];
  }
}

// What the blocks have found of a row, by a warp: into its next step, and its token and `top`. parts: of
// the row in each block, `stride` apart.
NABLA_FAST_DEVICE int join_blocks(const BlockPart* parts, int stride, const LatentsSharing& sharing,
                                  const Temperature& tau, LatentsRow& row) {
  RowPart found = no_part();
  for (int n = lane(); n < sharing.blocks; n += static_cast<int>(kWarpThreads))
    found = JoinParts{}(found, parts[n * stride].found);
  found = join_lanes(found);
  const float centre = parts[found.token / sharing.block_tokens * stride].base;
  float sum = 0, tilt = 0, spoiled = -kInfinity;
  for (int n = lane(); n < sharing.blocks; n += static_cast<int>(kWarpThreads)) {
    const BlockPart part = parts[n * stride];
    const float share = tempered_exp(part.found.top - found.top, tau);
    sum = fmaf(share, part.found.sum, sum);
    tilt = fmaf(share, fmaf(part.base - centre, part.found.sum, part.found.tilt), tilt);
    spoiled = fmaxf(spoiled, part.spoiled);
  }
  sum = join_warp(sum, Sum{});
  tilt = join_warp(tilt, Sum{});
  spoiled = join_warp(spoiled, Largest{});
  const bool number = status_of(found.top) == NABLA_FAST_OK;
  row.top = found.top;
  row.centre = centre;
  row.weight = tau.inverse / sum;
  // A mean that is no number makes NaN of the whole row.
  row.mean = number && !(tempered_exp(spoiled - found.top, tau) > 0) ? tilt / sum : kNaN;
  return found.token;
}

// A row after a pass: what the step before it came to, if there was one, and the rate of the next one.
NABLA_FAST_DEVICE void judge(const DescentRows& call, int64_t number, int token, LatentsRow& row) {
  if (row.taken < 0) {
    row.taken = 0;
    row.token = token;
    row.status = status_of(row.top);
    row.finished = row.finished || row.status != NABLA_FAST_OK;
  } else if (!row.finished) {
    ++row.taken;
    row.flipped = row.finished = token != row.token;
    row.token = token;
  }
  row.finished = row.finished || row.taken >= row.most;
  if (row.finished) return;
  const double rate = call.schedule[number * call.schedule_stride + row.before + row.taken];
  row.adam = adam_rate(rate, static_cast<double>(row.before + row.taken + 1));
}

// Moves columns of a row by its step: those of one strip, by a block. sums: of the row in each block, block
// by block `stride` apart. scratch: [kDescentWarps, kStrip].
NABLA_FAST_DEVICE void move_strip(const LatentsRow& row, const BlockPart* parts, int parts_stride,
                                  const float* sums, int64_t stride, int64_t pitch, int blocks,
                                  int column, int width, const Temperature& tau, float* scratch,
                                  float* h, float* exp_avg, float* exp_avg_sq) {
  float gradient = 0;
  for (int n = warp(); n < blocks && column < width; n += kDescentWarps) {
    const BlockPart part = parts[n * parts_stride];
    const float share = tempered_exp(part.found.top - row.top, tau);
    const float plain = sums[n * stride + column], tilted = sums[n * stride + pitch + column];
    gradient = fmaf(share, fmaf((part.base - row.centre) - row.mean, plain, tilted), gradient);
  }
  scratch[warp() * kStrip + lane()] = gradient;
  sync_block();
  if (warp() == 0 && column < width) {
    for (int n = 1; n < kDescentWarps; ++n) gradient += scratch[n * kStrip + lane()];
    adam_step(gradient * row.weight, row.adam, h[column], exp_avg[column], exp_avg_sq[column]);
  }
  sync_block();
}

// Up to kRows rows from `first_row` on. `count`: nothing is written but flip_after of the rows, and the
// state, which is a copy of the one that is given.
template <typename T, int kRows, int kEach>
__global__ void __launch_bounds__(kDescentThreads, 1)
    latents_kernel(Latents call, Rows<const T> head, LatentsSharing sharing, LatentsScratch scratch,
                   LatentsState given, int64_t first_row, int rows, bool count) {
  using Columns = LatentsColumns<T, kRows, kEach>;
  NABLA_FAST_SHARED(LatentsRows<kRows>, all);
  NABLA_FAST_SHARED(TileChanges<kRows>, changes);
  NABLA_FAST_SHARED(CopyBarriers, barriers);
  auto* const memory = static_cast<char*>(dynamic_shared());
  const TileSharing& shape = sharing.tiles;
  const int64_t tile_bytes = int64_t{shape.stages} * shape.tokens * shape.pitch;
  auto* const products = reinterpret_cast<float*>(memory + tile_bytes);
  auto* const weights =
      reinterpret_cast<TokenWeights*>(products + kDescentWarps * sharing.product_stride);
  const int begin = static_cast<int>(blockIdx.x) * sharing.block_tokens;
  const int end =
      begin + sharing.block_tokens < call.vocab ? begin + sharing.block_tokens : call.vocab;

  HeadTiles<T, Columns::kUnits> tiles(head, call.width, begin, end, shape, memory, barriers);
  tiles.begin();
  // Rows that are not there are the last one again, and never move.
  const auto row_of = [&](int r) { return first_row + (r < rows ? r : rows - 1); };
  for (int r = 0; r < kRows; ++r) {
    const int64_t before = call.rows.step[row_of(r)];
    const int64_t most = steps_left(call.rows, row_of(r), before, count);
    if (threadIdx.x == 0) all.of[r] = {0, 0, 0, 0, {0, 0}, before, most, -1, -1, 0, r >= rows, 0};
  }
  for (int r = 0; r < rows && scratch.noise; ++r)
    for (int token = begin + 4 * static_cast<int>(threadIdx.x); token < end;
         token += 4 * kDescentThreads)
      store_four(scratch.noise + r * scratch.noise_pitch + token,
                 gumbel_four(call.noise.seed[row_of(r)], call.noise.position[row_of(r)], token));
  if (count) {
    copy_rows(given, call.state, first_row, rows, call.width);
    sync_grid();
  }
  sync_block();

  auto* const hidden = reinterpret_cast<float*>(weights + kMostTileTokens * kRows);
  Columns columns(call.width, sharing.warps, hidden);
  TokensSoFar in_registers = {};
  TokensSoFar* so_far = &in_registers;
  if constexpr (!Columns::kHeld)
    so_far =
        reinterpret_cast<TokensSoFar*>(hidden + sharing.warps * Columns::kShared) + threadIdx.x;
  LatentsTokens tokens(*so_far);
  const int strips = (call.width + kStrip - 1) / kStrip;
  for (;;) {
    bool last = true;  // whether no row takes a step after this pass
    for (int r = 0; r < kRows; ++r)
      last = last && (all.of[r].finished || all.of[r].taken + 1 >= all.of[r].most);
    columns.begin([&](int r) { return call.state.h.row(row_of(r)); });
    const auto tokens_from = [&](int token) {
      return shape.tokens < end - token ? shape.tokens : end - token;
    };
    if (warp() < kRows) {
      const int warp_anew = thread_anew() / static_cast<int>(kWarpThreads);
      const int own = warp_anew < rows ? warp_anew : rows - 1;
      tokens.begin(call.grad.row(first_row + own),
                   call.noise.seed ? scratch.noise + own * scratch.noise_pitch : nullptr, begin,
                   tokens_from(begin));
    }
    for (int first = begin; first < end; first += shape.tokens) {
      const int here = tokens_from(first), next = first + shape.tokens;
      const T* const tile = tiles.wait();
      columns.multiply(tile, tiles.stride(), here, products + warp() * sharing.product_stride);
      sync_block();
      if (warp() < kRows) {
        float z = 0;
        for (int n = 0; n < sharing.warps && lane() < here; ++n)
          z += products[n * sharing.product_stride + lane() * kRows + warp()];
        TokenWeights weight;
        const TileChange change =
            tokens.meet(z, first, here, next, tokens_from(next), call.tau, weight);
        if (lane() < kMostTileTokens) weights[lane() * kRows + warp()] = weight;
        if (lane() == 0) changes.of[warp()] = change;
      }
      sync_block();
      if (!last) {
        bool careful = false;
        NABLA_FAST_UNROLL
        for (int r = 0; r < kRows; ++r) careful = careful || changes.of[r].careful;
        columns.change(changes.of);
        columns.add(tile, tiles.stride(), here, careful, weights);
      }
      tiles.release(!last);
    }
    const int64_t part = int64_t{blockIdx.x} * kRows;
    if (!last) columns.store(scratch.sums + 2 * part * scratch.sums_pitch, scratch.sums_pitch);
    if (warp() < kRows) {
      const BlockPart found = tokens.part();
      if (lane() == 0) scratch.parts[part + warp()] = found;
    }
    sync_grid();
    if (warp() < kRows) {
      LatentsRow row = all.of[warp()];
      const int token = join_blocks(scratch.parts + warp(), kRows, sharing, call.tau, row);
      judge(call.rows, row_of(warp()), token, row);
      sync_warp();
      if (lane() == 0) all.of[warp()] = row;
    }
    sync_block();
    // Rows of a group stop with the first of them.
    if (call.rows.group && lane() == 0 && warp() < rows)
      for (int r = 0; r < rows; ++r)
        if (all.of[r].flipped && call.rows.group[row_of(r)] == call.rows.group[row_of(warp())])
          all.of[warp()].finished = 1;
    sync_block();
    bool finished = true;
    for (int r = 0; r < kRows; ++r) finished = finished && all.of[r].finished;
    if (finished) break;
    for (int n = static_cast<int>(blockIdx.x); n < rows * strips; n += sharing.blocks) {
      const int r = n / strips;
      if (all.of[r].finished) continue;
      move_strip(all.of[r], scratch.parts + r, kRows, scratch.sums + 2 * r * scratch.sums_pitch,
                 2 * kRows * scratch.sums_pitch, scratch.sums_pitch, sharing.blocks,
                 n % strips * kStrip + lane(), call.width, call.tau, products,
                 call.state.h.row(first_row + r), call.state.exp_avg.row(first_row + r),
                 call.state.exp_avg_sq.row(first_row + r));
    }
    sync_grid();
  }
  tiles.end();
  if (blockIdx.x != 0 || threadIdx.x != 0) return;
  for (int r = 0; r < rows; ++r) {
    const LatentsRow& row = all.of[r];
    tell(call.rows, first_row + r, row.before, {row.taken, row.token, row.flipped != 0, false},
         row.status, count);
  }
}

// -- launches -------------------------------------------------------------------------------------

// Rows of a launch.
int64_t rows_of_launch(const nabla_fast_descent_args& call) {
  return std::min<int64_t>(call.head.width > kUsualWidth ? 1 : kMostLatentsRows, call.rows);
}

template <int kValue>
using Number = std::integral_constant<int, kValue>;

// Calls visit with a zero of the head's type, and as types the rows and columns of a kernel for a launch of
// so many rows.
template <typename Visit>
bool with_shape(const nabla_fast_descent_args& call, int64_t rows, const Visit& visit) {
  return with_element(call.head.dtype, [&](auto element) {
    if (call.head.width > kUsualWidth) return visit(element, Number<1>{}, Number<kWideColumns>{});
    if (rows == 1) return visit(element, Number<1>{}, Number<kColumns>{});
    if (rows == 2) return visit(element, Number<2>{}, Number<kColumns>{});
    return visit(element, Number<kMostLatentsRows>{}, Number<kColumns>{});
  });
}

bool lies_for_copies(const nabla_fast_descent_args& call) {
  const int64_t element = bytes_of(call.head.dtype);
  return reinterpret_cast<uintptr_t>(call.head.data) % 16 == 0 && call.head.width > 0 &&
         call.head.width * element % 16 == 0 &&
         stride_of(call.head, call.vocab) * element % 16 == 0;
}

// Bytes of dynamic shared memory, in all.
template <typename T, int kRows, int kEach>
int64_t shared_bytes(const LatentsSharing& sharing) {
  using Columns = LatentsColumns<T, kRows, kEach>;
  const TileSharing& tiles = sharing.tiles;
  const int64_t so_far = Columns::kHeld ? 0 : kRows * kWarpThreads * int64_t{sizeof(TokensSoFar)};
  return int64_t{tiles.stages} * tiles.tokens * tiles.pitch +
         kDescentWarps * sharing.product_stride * int64_t{sizeof(float)} +
         kMostTileTokens * kRows * int64_t{sizeof(TokenWeights)} +
         sharing.warps * Columns::kShared * int64_t{sizeof(float)} + so_far;
}

// Of a launch. It has no tiles where shared memory has no room for one token.
template <typename T, int kRows, int kEach>
LatentsSharing plan(const nabla_fast_descent_args& call, const Limits& limits) {
  constexpr int64_t kStaticBytes = sizeof(LatentsRows<kRows>) + sizeof(TileChanges<kRows>) +
                                   sizeof(CopyBarriers) + sizeof(LeastOfWarps);
  const bool bulk = limits.most_cluster > 1 && knows_clusters(latents_kernel<T, kRows, kEach>);
  LatentsSharing sharing = {};
  sharing.warps = static_cast<int>(std::min<int64_t>(
      blocks_for(call.head.width, kWide<T> * int64_t{kWarpThreads}), kDescentWarps));
  TileSharing& tiles = sharing.tiles;
  tiles.copies = !lies_for_copies(call) ? TileCopies::kLoads
                 : bulk                 ? TileCopies::kBulk
                                        : TileCopies::kOwn;
  tiles.pitch =
      static_cast<int>(std::max<int64_t>(rounded_up(call.head.width * int64_t{sizeof(T)}, 16), 16));
  // The largest tile of which two have room.
  for (tiles.tokens = kMostTileTokens;; tiles.tokens /= 2) {
    sharing.product_stride =
        static_cast<int>(std::max<int64_t>(rounded_up(tiles.tokens * kRows, kProducts), kStrip));
    tiles.stages = 0;
    const int64_t left = limits.shared_bytes - kStaticBytes - kSharedAlignment -
                         shared_bytes<T, kRows, kEach>(sharing);
    const int64_t stages = left / (int64_t{tiles.tokens} * tiles.pitch);
    tiles.stages = static_cast<int>(std::clamp<int64_t>(stages, 0, kMostStages));
    if (stages >= 2 || tiles.tokens == 1) break;
  }
  const int64_t blocks = std::min(limits.multiprocessors, blocks_for(call.vocab, kMostTileTokens));
  sharing.block_tokens = static_cast<int>(rounded_up(blocks_for(call.vocab, blocks), 4));
  sharing.blocks = static_cast<int>(blocks_for(call.vocab, sharing.block_tokens));
  return sharing;
}

Size lay_out(const nabla_fast_descent_args& call, const Limits& limits, char* memory,
             LatentsScratch& scratch) {
  const int64_t most = rows_of_launch(call);
  Layout layout(memory);
  scratch = {};
  with_shape(call, most, [&](auto element, auto rows, auto columns) {
    const LatentsSharing sharing =
        plan<decltype(element), decltype(rows)::value, decltype(columns)::value>(call, limits);
    const Size parts = Size(sharing.blocks) * decltype(rows)::value;
    scratch.sums_pitch = rounded_up(call.head.width, 8);
    scratch.noise_pitch = rounded_up(call.vocab, 4);
    if (descent::waits(call) && call.rows > most) {
      scratch.flip_after = layout.array<int64_t>(call.rows);
      scratch.copies = layout.array<float>(Size(most) * 3 * scratch.sums_pitch);
    }
    scratch.parts = layout.array<BlockPart>(parts);
    scratch.sums = layout.array<float>(parts * 2 * scratch.sums_pitch);
    if (call.noise_seed) scratch.noise = layout.array<float>(Size(most) * scratch.noise_pitch);
    return true;
  });
  return layout.bytes() + kAlignment;
}

nabla_fast_status check(const nabla_fast_descent_args& call) {
  if (const auto refused = check_descent(call)) return refused;
  if (call.rows == 0) return NABLA_FAST_OK;
  if (const auto refused = check_device_matrix(call.head, call.vocab, call.head.width))
    return refused;
  return call.head.width > kMostWidth ? NABLA_FAST_TOO_LARGE : NABLA_FAST_OK;
}

bool run(const nabla_fast_descent_args& call, const Limits& limits, const LatentsScratch& scratch,
         nabla_fast_cuda_stream stream) {
  const auto rows_of = [&](const nabla_fast_output& matrix) {
    return rows_from<float>(matrix, call.rows, 0);
  };
  const LatentsState given = {rows_of(call.parameter), rows_of(call.exp_avg),
                              rows_of(call.exp_avg_sq)};
  Latents latents = {descent_rows(call, scratch.flip_after),
                     given,
                     rows_from<float>(call.grad, call.rows, 0),
                     {call.noise_seed, call.noise_position},
                     static_cast<int>(call.vocab),
                     static_cast<int>(call.head.width),
                     Temperature(call.tau)};
  if (!descent::waits(call)) latents.rows.group = nullptr;
  const int64_t most = rows_of_launch(call);
  const auto copies = [&](int64_t first, int n) {
    return Rows<float>{scratch.copies + (n * most - first) * scratch.sums_pitch,
                       scratch.sums_pitch};
  };
  const auto take = [&](bool count) {
    return for_each_part(call.rows, most, [&](int64_t first, int64_t some) {
      latents.state =
          count ? LatentsState{copies(first, 0), copies(first, 1), copies(first, 2)} : given;
      return with_shape(call, some, [&](auto element, auto rows, auto columns) {
        using T = decltype(element);
        constexpr int kRows = decltype(rows)::value, kEach = decltype(columns)::value;
        const LatentsSharing sharing = plan<T, kRows, kEach>(call, limits);
        if (sharing.tiles.stages == 0) return false;
        Launch how = {"latents_kernel", stream, sharing.blocks, kDescentThreads,
                      static_cast<size_t>(shared_bytes<T, kRows, kEach>(sharing))};
        how.cooperative = true;
        return launch(how, latents_kernel<T, kRows, kEach>, latents,
                      rows_from<T>(call.head, call.vocab, 0), sharing, scratch, given, first,
                      static_cast<int>(some), count);
      });
    });
  };
  return (!scratch.flip_after || take(true)) && take(false);
}

}  // namespace
}  // namespace nabla_fast::cuda

using namespace nabla_fast;
using namespace nabla_fast::cuda;

int64_t nabla_fast_cuda_dto_descent_latents_workspace(const nabla_fast_descent_args* args) {
  return workspace_bytes(args, check, [](const nabla_fast_descent_args& call) -> Size {
    Limits limits;
    LatentsScratch none;
    if (call.rows == 0 || !read_limits(limits)) return 0;
    return lay_out(call, limits, nullptr, none);
  });
}

nabla_fast_status nabla_fast_cuda_dto_descent_latents(const nabla_fast_descent_args* args,
                                                      nabla_fast_cuda_stream stream) {
  nabla_fast_descent_args call;
  if (const auto refused = read_args(args, call)) return refused;
  // The host's check of fields that it does not know, for one that these kernels do not.
  if (call.head_map.bias || call.head_map.scale != 0 || call.head_map.softcap != 0)
    return NABLA_FAST_INVALID_SIZE;
  if (const auto refused = check(call)) return refused;
  if (call.rows == 0) return NABLA_FAST_OK;
  Limits limits;
  if (!read_limits(limits)) return answer(false);
  LatentsScratch scratch;
  const int64_t bytes = lay_out(call, limits, nullptr, scratch).or_zero();
  if (const auto refused = descent::check_outputs(call, call.head.width, &call.head, bytes))
    return refused;
  lay_out(call, limits, aligned(call.workspace), scratch);
  return answer(run(call, limits, scratch, stream));
}
