// A block's tokens of a head, a tile at a time in shared memory: a stream that goes through all of them
// again in every pass, and so is ahead where one pass ends and the next has not begun.
#ifndef NABLA_FAST_CUDA_HEAD_TILES_H_
#define NABLA_FAST_CUDA_HEAD_TILES_H_

#include "descent_row.h"
#include "device.h"
#include "slices.h"

namespace nabla_fast::cuda {

// How a tile comes from memory. kBulk and kOwn need rows of the head that begin at multiples of 16 bytes
// and have a multiple of 16 of them.
enum class TileCopies {
  kBulk,   // by bulk copies, from sm_90 on
  kOwn,    // each thread copies its own columns while it computes
  kLoads,  // each thread loads and stores its own columns, and waits for them
};

constexpr int kMostTileTokens = 16;
constexpr int kMostStages = 8;

// Tiles of a launch.
struct TileSharing {
  TileCopies copies;
  int tokens;  // of a tile, at most kMostTileTokens
  int stages;  // tiles that have room, at most kMostStages
  int pitch;   // bytes of a token's row in shared memory
};

struct CopyBarriers {
  CopyBarrier of[kMostStages];
};

// First of the columns number n of a thread that are next to each other.
template <typename T>
NABLA_FAST_DEVICE int column_of(int n) {
  return (n * kDescentThreads + static_cast<int>(threadIdx.x)) * kWide<T>;
}

// The same, computed anew: for code whose registers should not be taken where it does not run.
template <typename T>
NABLA_FAST_DEVICE int column_anew(int n) {
  return (n * kDescentThreads + thread_anew()) * kWide<T>;
}

// A thread has kUnits times kWide<T> columns.
template <typename T, int kUnits>
class HeadTiles {
 public:
  // memory: of all stages, in shared memory.
  NABLA_FAST_DEVICE HeadTiles(const Rows<const T>& head, int width, int begin, int end,
                              const TileSharing& sharing, char* memory, CopyBarriers& barriers)
      : head_(head),
        width_(width),
        begin_(begin),
        end_(end),
        sharing_(sharing),
        memory_(memory),
        barriers_(barriers),
        next_(begin) {}

  NABLA_FAST_DEVICE void begin() {
    if (sharing_.copies == TileCopies::kBulk) {
      if (threadIdx.x == 0)
        for (int n = 0; n < sharing_.stages; ++n) init_copies(&barriers_.of[n]);
      sync_block();
    }
    NABLA_FAST_KEEP_LOOP
    for (int n = 0; n < sharing_.stages; ++n) load(n, true);
  }

  // Waits for the next tile; element 0 of its first token.
  NABLA_FAST_DEVICE const T* wait() {
    if (sharing_.copies == TileCopies::kBulk)
      wait_for_copies(&barriers_.of[stage()], place_ >= sharing_.stages);
    else if (sharing_.copies == TileCopies::kOwn)
      wait_for_own(1);
    --ahead_;
    return reinterpret_cast<const T*>(memory_of(stage()));
  }

  // After the tile was read: another takes its place. `again`: there is a pass after this one.
  NABLA_FAST_DEVICE void release(bool again) {
    if (sharing_.copies == TileCopies::kBulk) sync_block();
    load(stage(), again);
    step();
  }

  // Waits for what has come for nothing: nothing may come when the block has ended.
  NABLA_FAST_DEVICE void end() {
    if (sharing_.copies == TileCopies::kOwn) wait_for_own(0);
    for (; sharing_.copies == TileCopies::kBulk && ahead_ > 0; step()) wait();
  }

  // Elements between tokens of a tile.
  NABLA_FAST_DEVICE int stride() const { return sharing_.pitch / static_cast<int>(sizeof(T)); }

 private:
  // The stage of the tile that is read next.
  NABLA_FAST_DEVICE int stage() const {
    return place_ < sharing_.stages ? place_ : place_ - sharing_.stages;
  }
  NABLA_FAST_DEVICE void step() { place_ = place_ + 1 < 2 * sharing_.stages ? place_ + 1 : 0; }

  NABLA_FAST_DEVICE char* memory_of(int stage) const {
    return memory_ + stage * (sharing_.tokens * sharing_.pitch);
  }

  // With one stage there is none to leave under way.
  NABLA_FAST_DEVICE void wait_for_own(int left) const {
    if (left > 0 && sharing_.stages > 1)
      wait_for_copy_groups<1>();
    else
      wait_for_copy_groups<0>();
  }

  // Puts the stream's next tile into a stage, unless it is of a pass that will not be.
  NABLA_FAST_DEVICE void load(int into, bool again) {
    if (next_ == end_ && again) next_ = begin_;
    const int tokens = sharing_.tokens < end_ - next_ ? sharing_.tokens : end_ - next_;
    if (sharing_.copies == TileCopies::kBulk) {
      load_bulk(into, tokens);
    } else {
      NABLA_FAST_KEEP_LOOP
      for (int n = 0; n < tokens; ++n) load_own(memory_of(into) + n * sharing_.pitch, next_ + n);
    }
    if (sharing_.copies == TileCopies::kOwn) end_copy_group();
    next_ += tokens;
    ahead_ += tokens > 0;
  }

  NABLA_FAST_DEVICE void load_bulk(int into, int tokens) const {
    if (threadIdx.x != 0 || tokens == 0) return;
    const uint32_t bytes = static_cast<uint32_t>(width_) * sizeof(T);
    expect_copies(&barriers_.of[into], static_cast<uint32_t>(tokens) * bytes);
    NABLA_FAST_KEEP_LOOP
    for (int n = 0; n < tokens; ++n)
      bulk_copy(memory_of(into) + n * sharing_.pitch, head_.row(next_ + n), bytes,
                &barriers_.of[into]);
  }

  // This thread's columns of a token, 0 past the end of the row.
  NABLA_FAST_DEVICE void load_own(char* to, int token) const {
    const T* const row = head_.row(token);
    NABLA_FAST_UNROLL
    for (int unit = 0; unit < kUnits; ++unit) {
      const int column = column_anew<T>(unit);
      if (column >= width_) continue;
      T* const at = reinterpret_cast<T*>(to) + column;
      if (sharing_.copies == TileCopies::kOwn) {
        copy_16(at, row + column);
        continue;
      }
      NABLA_FAST_UNROLL
      for (int n = 0; n < kWide<T>; ++n) at[n] = column + n < width_ ? row[column + n] : T{};
    }
  }

  const Rows<const T> head_;
  const int width_, begin_, end_;
  const TileSharing sharing_;
  char* const memory_;
  CopyBarriers& barriers_;
  int next_;       // token that is loaded next
  int ahead_ = 0;  // tiles that have been loaded and not been waited for
  int place_ = 0;  // of the tile that is read next, in two rounds: barriers pass in turns
};

}  // namespace nabla_fast::cuda

#endif  // NABLA_FAST_CUDA_HEAD_TILES_H_
