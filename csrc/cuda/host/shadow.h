// Shadow of memory: who wrote each byte last, and who has read it since.
//
// Two accesses to a byte of which one writes are a race unless the same thread makes both or a
// barrier that both threads pass lies between them. Barriers are nested: of a warp, a block, a
// cluster and a grid, each of all threads. So an access is known by its thread and by how many
// barriers of each level that thread had passed, and two accesses are ordered if the number differs
// at a level that both threads share.
//
// A byte's readers since the last write are two: those furthest apart. Whoever is ordered after both
// of them is ordered after all others. (Of readers in one warp, a barrier that comes after one and
// that the writer has passed comes after the other too, or is passed by neither; and so on upwards:
// the number of shared levels makes an ultrametric, whose widest pair bounds every other distance.)
//
// What a copy brings while its thread goes on is ordered before the threads that have waited for it, each
// for itself.
#ifndef NABLA_FAST_CUDA_HOST_SHADOW_H_
#define NABLA_FAST_CUDA_HOST_SHADOW_H_

#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <vector>

#include "host/report.h"

namespace nabla_fast::host {

// Levels of barriers, from the innermost one.
enum Level { kWarp, kBlock, kCluster, kGrid };
constexpr int kLevels = 4;

constexpr unsigned kWarpThreads = 32;

// A thread between two barriers, or the arrival of what it copies.
struct Instant {
  unsigned block, thread;    // index in the grid; in the block
  unsigned passed[kLevels];  // barriers of its warp, block, cluster and grid
  // Of an arrival: on what one waits for it, and how many arrivals there have to be. 0: no arrival.
  unsigned source = 0, arrivals = 0;
};

// Source of the copies that a thread makes and waits for alone. Others are barriers of the block.
constexpr unsigned kOwnCopies = 1;

// All instants of a launch, by numbers that no other launch has; 0 is none.
class Instants {
 public:
  // Begins a launch: what came before is ordered before all of it.
  void begin(unsigned blocks_per_cluster, unsigned threads) {
    base_ += static_cast<uint32_t>(instants_.size());
    instants_.clear();
    waited_.clear();
    blocks_per_cluster_ = blocks_per_cluster;
    threads_ = threads;
  }
  uint32_t add(const Instant& instant) {
    instants_.push_back(instant);
    return base_ + static_cast<uint32_t>(instants_.size()) - 1;
  }
  const Instant& operator[](uint32_t number) const { return instants_[number - base_]; }

  // A thread has waited until a source had so many arrivals.
  void wait(unsigned block, unsigned thread, unsigned source, unsigned arrivals);

  // True if what happened at `before` cannot overlap `now`.
  bool ordered(uint32_t before, uint32_t now) const;
  // Levels that two threads do not share: 0 for one thread, kLevels for different clusters.
  int distance(uint32_t a, uint32_t b) const;

 private:
  bool has_waited(const Instant& thread, const Instant& arrival) const;

  std::vector<Instant> instants_;
  std::vector<std::vector<unsigned>> waited_;  // arrivals by thread of the grid and source
  uint32_t base_ = 1;
  unsigned blocks_per_cluster_ = 1, threads_ = 1;
};

// An access to a byte: when, and by which instruction (as a distance from one of this library).
struct Access {
  uint32_t instant;
  int32_t place;
};

// A byte of zeros has not been touched.
struct ShadowByte {
  Access writer, readers[2];
};

// What an access conflicts with.
struct Conflict {
  enum Kind { kNone, kWritten, kRead } kind = kNone;
  Access with{};
};

Place place_of(const Access& access);
Access access_at(uint32_t instant, Place place);

// Records an access to one byte.
Conflict record(const Instants& instants, ShadowByte& byte, const Access& access, bool writes);

// The shadow of an array. Pages of it take memory when they are touched.
class Shadow {
 public:
  explicit Shadow(size_t bytes)
      : bytes_(static_cast<ShadowByte*>(std::calloc(bytes, sizeof(ShadowByte)))) {
    if (!bytes_ && bytes > 0) std::abort();
  }
  ~Shadow() { std::free(bytes_); }
  Shadow(Shadow&& other) noexcept : bytes_(other.bytes_) { other.bytes_ = nullptr; }
  Shadow& operator=(Shadow&&) = delete;

  ShadowByte& operator[](size_t n) { return bytes_[n]; }

 private:
  ShadowByte* bytes_;
};

}  // namespace nabla_fast::host

#endif  // NABLA_FAST_CUDA_HOST_SHADOW_H_
