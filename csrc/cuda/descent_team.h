// The blocks that share a row: a thread-block cluster, or a part of a cooperative grid.
#ifndef NABLA_FAST_CUDA_DESCENT_TEAM_H_
#define NABLA_FAST_CUDA_DESCENT_TEAM_H_

#include "descent_row.h"
#include "device.h"
#include "joins.h"

namespace nabla_fast::cuda {

constexpr unsigned kMostCluster = 16;

struct PartsOfWarps {
  RowPart of[kDescentWarps];
};
// Of the last two joins: other blocks may still read those of one while the next are written.
struct PartsOfCluster {
  RowPart of[2][kMostCluster];
};

// Every lane's result is the same.
NABLA_FAST_DEVICE RowPart join_lanes(RowPart part) { return join_warp(part, JoinParts{}); }

// kGrid: the blocks are neighbours in a cooperative grid, in which all teams have the same size and join
// together. Else a team is a cluster.
template <bool kGrid>
class Team {
 public:
  // parts_of_grid: [2, blocks of the grid].
  NABLA_FAST_DEVICE Team(unsigned size, PartsOfWarps& warps, PartsOfCluster& cluster,
                         RowPart* parts_of_grid)
      : size_(size), warps_(warps), cluster_(cluster), grid_(parts_of_grid) {
    // No block writes into another one that has not begun.
    if (!kGrid) sync_cluster();
  }

  NABLA_FAST_DEVICE unsigned rank() const { return blockIdx.x % size_; }
  NABLA_FAST_DEVICE int64_t number() const { return blockIdx.x / size_; }

  // What all threads of the team have found. A thread that has a `part` with the largest y of its warp
  // is asked for its token: first_with(y).
  template <typename FirstWith>
  NABLA_FAST_DEVICE RowPart join(RowPart part, const FirstWith& first_with) {
    const float own = part.top;
    float top = own;
    for (unsigned lanes = kWarpThreads / 2; lanes > 0; lanes /= 2)
      top = max_or_nan(top, shuffle_xor(top, lanes));
    part.top = top;
    part.token = same_number(own, top) ? first_with(top) : kNoToken;
    part = join_lanes(part);
    if (lane() == 0) warps_.of[warp()] = part;
    sync_block();
    turn_ ^= 1;
    if (warp() == 0) publish(join_lanes(lane() < kDescentWarps ? warps_.of[lane()] : no_part()));
    if (kGrid)
      sync_grid();
    else
      sync_cluster();
    RowPart joined = no_part();
    for (int n = lane(); n < static_cast<int>(size_); n += static_cast<int>(kWarpThreads))
      joined = JoinParts{}(joined, kGrid ? of_grid()[number() * size_ + n] : cluster_.of[turn_][n]);
    return join_lanes(joined);
  }

  // Whether all teams that join together had finished before they joined.
  NABLA_FAST_DEVICE bool all_finished(bool finished) const {
    if (!kGrid) return finished;
    bool goes_on = false;
    const int teams = static_cast<int>(gridDim.x / size_);
    for (int team = lane(); team < teams; team += static_cast<int>(kWarpThreads))
      goes_on = goes_on || !of_grid()[int64_t{team} * size_].finished;
    return !any_of_warp(goes_on);
  }

 private:
  NABLA_FAST_DEVICE RowPart* of_grid() const { return grid_ + turn_ * int64_t{gridDim.x}; }

  // By a warp.
  NABLA_FAST_DEVICE void publish(const RowPart& part) {
    if (kGrid) {
      if (lane() == 0) of_grid()[blockIdx.x] = part;
    } else if (lane() < static_cast<int>(size_)) {
      *shared_of(&cluster_.of[turn_][rank()], static_cast<unsigned>(lane())) = part;
    }
  }

  const unsigned size_;
  PartsOfWarps& warps_;
  PartsOfCluster& cluster_;
  RowPart* const grid_;
  int turn_ = 0;
};

}  // namespace nabla_fast::cuda

#endif  // NABLA_FAST_CUDA_DESCENT_TEAM_H_
