// nabla_fast_cuda_dto_descent: rows that stay on the chip from the first step to the last.
//
// Blocks share a row: a part of a cooperative grid for up to three rows and on devices without
// clusters, else a cluster each. A block reads its tokens once, takes all steps and writes them once.
// A step is one pass over what it keeps: z moves by sums S and T that the pass before has left, and the
// sums of the next step are taken on the way. For these the blocks meet once a step; each joins the
// parts of all in the same order, and so finds by itself whether the row goes on.
//
// S = sum exp((y - reference) / tau) and T = sum exp((y - reference) / tau) (G - G[token]), y = z +
// noise. The token is the row's until it stops, and its G with it; the reference is taken anew where the
// largest y has moved away from it.
//
// Rows of a group stop after as many steps as the first of them needs: a launch that writes nothing back
// counts every row's steps, the next one takes the least of a group.

#include <algorithm>

#include "adam.h"
#include "call.h"
#include "descent_row.h"
#include "descent_rows.h"
#include "descent_team.h"
#include "device_limits.h"
#include "exponential.h"
#include "joins.h"
#include "launch.h"
#include "nabla_fast_cuda.h"
#include "slices.h"

namespace nabla_fast::cuda {
namespace {

// Distance that the largest y / tau may move before the sums are taken relative to it anew.
constexpr float kDrift = 8;
// Steps whose rates are computed at a time.
constexpr int kRates = 64;
// Rows that a cooperative grid is better for than clusters are.
constexpr int64_t kFewRows = 3;
// Most bytes of tokens that have no place on the chip.
constexpr int64_t kSpilledBytes = int64_t{64} << 20;

// Arguments of all rows.
struct Descent {
  DescentRows rows;
  Rows<float> z, exp_avg, exp_avg_sq;
  Rows<const float> grad;
  Noise noise;
  int vocab;
  Temperature tau;
  float tau_value;
};

// How blocks share the rows of a launch.
struct Sharing {
  bool grid;         // a cooperative grid; else clusters
  int64_t team;      // blocks of a row
  int64_t rows;      // of a launch, at most
  int block_tokens;  // at most
  int shared_tiles;  // of a block
  int64_t spilled;   // elements of a block
};

struct Rates {
  AdamRate of[kRates];
};

// -- kernel ---------------------------------------------------------------------------------------

// T / S times the weight of a step.
NABLA_FAST_DEVICE float mean_of(const RowPart& part, const Temperature& tau) {
  return part.tilt / part.sum * (tau.inverse / part.sum);
}

NABLA_FAST_DEVICE int within(int64_t token, int vocab) {
  return token < vocab ? static_cast<int>(token) : vocab;
}

// The row of a launch. `count`: nothing is written but flip_after of the rows.
template <bool kGrid, bool kNoise>
__global__ void __launch_bounds__(kDescentThreads, 1)
    descent_kernel(Descent call, Sharing sharing, int64_t first_row, RowPart* parts_of_grid,
                   float* spilled, bool count) {
  if (!kGrid && !kHasClusters) return;  // never launched there
  NABLA_FAST_SHARED(PartsOfWarps, warps);
  NABLA_FAST_SHARED(PartsOfCluster, cluster);
  NABLA_FAST_SHARED(Rates, rates);
  Team<kGrid> team(static_cast<unsigned>(sharing.team), warps, cluster, parts_of_grid);
  const int64_t row = first_row + team.number();
  const int64_t begin = team.rank() * int64_t{sharing.block_tokens};
  auto* const memory = static_cast<float*>(dynamic_shared());
  constexpr int kHeldTiles = kTilesHeld<kGrid, kNoise>;
  TokensOfBlock<kNoise, kHeldTiles> tokens(
      within(begin, call.vocab), within(begin + sharing.block_tokens, call.vocab), memory,
      memory + kHeldTiles * kHeldElements<kNoise>, sharing.shared_tiles,
      spilled + blockIdx.x * sharing.spilled);
  const float* const grad = call.grad.row(row);
  tokens.load(call.z.row(row), call.exp_avg.row(row), call.exp_avg_sq.row(row), grad,
              kNoise ? call.noise.seed[row] : 0, kNoise ? call.noise.position[row] : 0);
  const int64_t before = call.rows.step[row];
  const int64_t most = steps_left(call.rows, row, before, count);
  const double* const schedule = call.rows.schedule + row * call.rows.schedule_stride + before;

  const auto first_with = [&](float top) { return tokens.first_with(top); };
  RowPart part = team.join(tokens.find_top(), first_with);
  const nabla_fast_status status = status_of(part.top);
  Outcome outcome = {0, part.token, false, false};
  float reference = part.top;
  bool stale = true;
  bool finished = status != NABLA_FAST_OK || most == 0;
  if (!finished) tokens.centre_grad(grad[part.token]);
  int prepared = 0;  // steps whose rates are there
  for (;;) {
    RowPart mine = no_part();
    if (!finished && stale) {
      reference = part.top;
      mine = tokens.measure(reference, call.tau);
    } else if (!finished) {
      if (outcome.taken == prepared) {
        // The last rates have been read: a join lies between.
        const int n = static_cast<int>(threadIdx.x);
        if (n < kRates && prepared + n < most)
          rates.of[n] =
              adam_rate(schedule[prepared + n], static_cast<double>(before + prepared + n + 1));
        prepared += kRates;
        sync_block();
      }
      const Step step = {call.tau.inverse / part.sum, mean_of(part, call.tau),
                         rates.of[outcome.taken % kRates]};
      mine = tokens.step(step, reference, call.tau);
    }
    mine.finished = finished;
    const RowPart joined = team.join(mine, first_with);
    if (team.all_finished(finished)) break;
    if (finished) continue;
    part = joined;
    if (!stale) {
      ++outcome.taken;
      outcome.flipped = part.token != outcome.token;
      outcome.token = part.token;
    }
    const bool number = status_of(part.top) == NABLA_FAST_OK;
    finished = outcome.flipped || outcome.taken == most;
    stale = number && !(fabsf(part.top - reference) <= kDrift * call.tau_value);
    // The next step makes NaN of the whole row, whose token is the first then.
    outcome.spoiled = !finished && !stale &&
                      (!number || part.spoiled || !(fabsf(mean_of(part, call.tau)) < kInfinity));
    if (outcome.spoiled) {
      outcome.flipped = outcome.token != 0;
      outcome.taken = outcome.flipped ? outcome.taken + 1 : most;
      outcome.token = 0;
      finished = true;
    }
    if (finished && !kGrid) break;
  }
  if (!count && outcome.taken > 0)
    tokens.store(call.z.row(row), call.exp_avg.row(row), call.exp_avg_sq.row(row), outcome.spoiled);
  if (team.rank() == 0 && threadIdx.x == 0) tell(call.rows, row, before, outcome, status, count);
}

// -- launches -------------------------------------------------------------------------------------

// Bytes of the kernel's variables beside its tiles, and some that the system takes.
constexpr int64_t kStaticBytes =
    sizeof(PartsOfWarps) + sizeof(PartsOfCluster) + sizeof(Rates) + sizeof(LeastOfWarps) + 1024;

template <bool kNoise>
Sharing sharing_of(const nabla_fast_descent_args& call, const Limits& limits) {
  Sharing sharing = {};
  sharing.grid = call.rows <= kFewRows || limits.most_cluster == 1;
  const int64_t held = sharing.grid ? kTilesHeld<true, kNoise> : kTilesHeld<false, kNoise>;
  const int64_t left =
      limits.shared_bytes - kStaticBytes - held * kHeldElements<kNoise> * int64_t{sizeof(float)};
  const int64_t most_shared =
      std::max<int64_t>(left / (kTileElements<kNoise> * int64_t{sizeof(float)}), 0);
  const int64_t least = blocks_for(call.vocab, (held + most_shared) * kTileTokens);
  const int64_t tiles = blocks_for(call.vocab, kTileTokens);
  if (sharing.grid) {
    sharing.rows = std::clamp<int64_t>(limits.multiprocessors / least, 1, call.rows);
    sharing.team = std::min(limits.multiprocessors / sharing.rows, tiles);
  } else {
    sharing.rows = call.rows;
    sharing.team = 1;
    // More blocks than a row needs where there are multiprocessors for them.
    while (2 * sharing.team <= limits.most_cluster && sharing.team < tiles &&
           (sharing.team < least || 2 * sharing.team * call.rows <= limits.multiprocessors))
      sharing.team *= 2;
  }
  const int64_t tokens = rounded_up(blocks_for(call.vocab, sharing.team), 4);
  const int64_t others = std::max<int64_t>(blocks_for(tokens, kTileTokens) - held, 0);
  sharing.block_tokens = static_cast<int>(tokens);
  sharing.shared_tiles = static_cast<int>(std::min(others, most_shared));
  sharing.spilled = (others - sharing.shared_tiles) * kTileElements<kNoise>;
  const int64_t row_bytes = sharing.spilled * sharing.team * int64_t{sizeof(float)};
  if (row_bytes > 0) sharing.rows = std::clamp<int64_t>(kSpilledBytes / row_bytes, 1, sharing.rows);
  return sharing;
}

template <bool kGrid, bool kNoise>
Launch launch_of(const Sharing& sharing, int64_t rows, nabla_fast_cuda_stream stream) {
  const int64_t elements = kTilesHeld<kGrid, kNoise> * kHeldElements<kNoise> +
                           sharing.shared_tiles * kTileElements<kNoise>;
  Launch how = {"descent_kernel", stream, rows * sharing.team, kDescentThreads,
                static_cast<size_t>(elements) * sizeof(float)};
  how.cluster = kGrid ? 1 : static_cast<unsigned>(sharing.team);
  how.cooperative = kGrid;
  return how;
}

// False where there is no device.
bool plan(const nabla_fast_descent_args& call, Sharing& sharing) {
  Limits limits;
  if (!read_limits(limits)) return false;
  with_flag(call.noise_seed != nullptr, [&](auto noise) {
    constexpr bool kNoise = decltype(noise)::value;
    if (!knows_clusters(descent_kernel<false, kNoise>)) limits.most_cluster = 1;
    sharing = sharing_of<kNoise>(call, limits);
    if (sharing.grid || sharing.team <= kPortableCluster) return;
    const Launch one = launch_of<false, kNoise>(sharing, 1, nullptr);
    if (takes_clusters(one, descent_kernel<false, kNoise>)) return;
    limits.most_cluster = kPortableCluster;
    sharing = sharing_of<kNoise>(call, limits);
  });
  return true;
}

struct Scratch {
  int64_t* flip_after;
  RowPart* parts;
  float* spilled;
};

Size lay_out(const nabla_fast_descent_args& call, const Sharing& sharing, char* memory,
             Scratch& scratch) {
  const Size blocks = Size(sharing.rows) * sharing.team;
  Layout layout(memory);
  scratch = {};
  if (descent::waits(call)) scratch.flip_after = layout.array<int64_t>(call.rows);
  if (sharing.grid) scratch.parts = layout.array<RowPart>(blocks * 2);
  scratch.spilled = layout.array<float>(blocks * sharing.spilled);
  return layout.bytes() + kAlignment;
}

bool run(const nabla_fast_descent_args& call, const Sharing& sharing, const Scratch& scratch,
         nabla_fast_cuda_stream stream) {
  const auto rows_of = [&](const nabla_fast_output& matrix) {
    return rows_from<float>(matrix, call.rows, 0);
  };
  const Descent descent = {descent_rows(call, scratch.flip_after),
                           rows_of(call.parameter),
                           rows_of(call.exp_avg),
                           rows_of(call.exp_avg_sq),
                           rows_from<float>(call.grad, call.rows, 0),
                           {call.noise_seed, call.noise_position},
                           static_cast<int>(call.vocab),
                           Temperature(call.tau),
                           static_cast<float>(call.tau)};
  const auto take = [&](bool count) {
    return for_each_part(call.rows, sharing.rows, [&](int64_t first, int64_t rows) {
      return with_flag(sharing.grid, [&](auto grid) {
        return with_flag(call.noise_seed != nullptr, [&](auto noise) {
          constexpr bool kGrid = decltype(grid)::value, kNoise = decltype(noise)::value;
          return launch(launch_of<kGrid, kNoise>(sharing, rows, stream),
                        descent_kernel<kGrid, kNoise>, descent, sharing, first, scratch.parts,
                        scratch.spilled, count);
        });
      });
    });
  };
  return (!scratch.flip_after || take(true)) && take(false);
}

}  // namespace
}  // namespace nabla_fast::cuda

using namespace nabla_fast;
using namespace nabla_fast::cuda;

int64_t nabla_fast_cuda_dto_descent_workspace(const nabla_fast_descent_args* args) {
  return workspace_bytes(args, check_descent, [](const nabla_fast_descent_args& call) -> Size {
    Sharing sharing;
    Scratch none;
    if (call.rows == 0 || !plan(call, sharing)) return 0;
    return lay_out(call, sharing, nullptr, none);
  });
}

nabla_fast_status nabla_fast_cuda_dto_descent(const nabla_fast_descent_args* args,
                                              nabla_fast_cuda_stream stream) {
  nabla_fast_descent_args call;
  if (const auto refused = read_args(args, call)) return refused;
  if (const auto refused = check_descent(call)) return refused;
  if (call.rows == 0) return NABLA_FAST_OK;
  Sharing sharing;
  if (!plan(call, sharing)) return answer(false);
  Scratch scratch;
  const int64_t bytes = lay_out(call, sharing, nullptr, scratch).or_zero();
  if (const auto refused = descent::check_outputs(call, call.vocab, nullptr, bytes)) return refused;
  lay_out(call, sharing, aligned(call.workspace), scratch);
  return answer(run(call, sharing, scratch, stream));
}
