#include "host/grid.h"

#include <algorithm>
#include <cstring>
#include <deque>
#include <memory>
#include <random>
#include <string>
#include <utility>
#include <vector>

#include "host/control.h"
#include "host/fiber.h"
#include "host/memory.h"

namespace nabla_fast::host {
namespace {

bool lists_launches = false;
std::string launches;

// Threads that a barrier waits for.
struct Group {
  unsigned members = 0, passed = 0;
  std::vector<struct Thread*> waiting;
};

// A barrier of bulk copies.
struct CopyBarrier {
  unsigned passed = 0, waited = 0;  // times; the last one that a thread has waited for
  bool expecting = false;           // whether it has been told of its bytes
  int64_t missing = 0;              // bytes
  uint32_t arrival = 0;             // instant of what comes next
  std::vector<struct Thread*> waiting;
};

struct Block {
  unsigned index;
  unsigned live;  // threads that have not ended
  // By their addresses, in order of their making.
  std::vector<std::pair<const void*, CopyBarrier>> copies;
  Group group;
  std::vector<Group> warps;
  SharedMemory* shared;
  struct Cluster* cluster;
};

struct Cluster {
  Group group;
  std::vector<Block*> blocks;
};

struct Thread {
  Fiber* fiber;
  Block* block;
  unsigned index;
  // Where it waits, and what for: a level, or the lanes of `mask`.
  Place place;
  const char* waits;
  uint32_t mask;
  unsigned source;
  uint64_t value, result;
  bool votes;
  uint32_t instant;
  unsigned passed;  // barriers of all levels, when `instant` was made
  // Groups of its own copies that have ended, and that it has waited for. What comes is held back.
  unsigned groups, groups_waited;
  struct Copy {
    void* to;
    char bytes[16];
    unsigned group;
  };
  std::deque<Copy> copies;
};

struct Target {
  int name;
  size_t shared_bytes;
};
// Shared memory that a block may have on each target.
constexpr Target kTargets[] = {{80, 166912}, {90, 232448}, {100, 232448}, {120, 101376}};

constexpr unsigned kMostThreads = 1024, kMostCluster = 16, kPortableCluster = 8;
// Blocks that run together have a fiber a thread.
constexpr unsigned kMostTogether = 16384;

// An access so many bytes behind an array is told as one of that array.
constexpr size_t kNear = 1 << 16;

constexpr const char* kLevelNames[] = {"warp", "block", "cluster", "grid"};
constexpr const char* kCopies = "copies";

GlobalMemory global;
Instants instants;
uint64_t seed = 0;
const Target* target = &kTargets[1];
// As a test says; 0 for nothing.
int64_t limits[3] = {};

// The launch that runs, and its thread that runs.
class Grid;
Grid* grid = nullptr;
Thread* running = nullptr;

class Grid {
 public:
  Grid(const Shape& shape, void (*body)(void*), void* arguments)
      : shape_(shape), body_(body), arguments_(arguments), random_(seed) {}

  bool run();

  const Shape& shape() const { return shape_; }
  Group& group(Level level) {
    Block& block = *running->block;
    if (level == kWarp) return block.warps[running->index / kWarpThreads];
    if (level == kBlock) return block.group;
    return level == kCluster ? block.cluster->group : everyone_;
  }

  void release(Thread* thread) {
    thread->waits = nullptr;
    ready_.push_back(thread);
  }
  void barrier(Level level, Place place);
  void meet(Place place);

  // The thread and where it is, then what is wrong.
  void say(const std::string& what, Place place) { report(where(*running) + what + at(place)); }
  // The same, and nothing runs any more.
  [[noreturn]] void stop(const std::string& what, Place place) {
    say(what, place);
    stopped_ = true;
    for (;;) running->fiber->suspend();
  }
  void race(const Conflict& conflict, const Region& region, size_t byte, bool writes, Place place);

  uint32_t instant();

  CopyBarrier& copies_of(const void* barrier, Place place, unsigned& source);
  void pass_if_complete(CopyBarrier& barrier);
  void wait_for_copies(const void* barrier, unsigned parity, Place place);

 private:
  void run_together(unsigned first, unsigned count);
  void report_waiting();
  std::string where(const Thread& thread) const {
    return std::string(shape_.kernel) + ", block " + std::to_string(thread.block->index) +
           ", thread " + std::to_string(thread.index) + ": ";
  }
  static std::string at(Place place) { return " (" + line_of(place) + ")"; }

  const Shape shape_;
  void (*body_)(void*);
  void* arguments_;
  std::mt19937_64 random_;
  bool stopped_ = false;
  Group everyone_;
  std::vector<Thread> threads_;
  std::vector<Thread*> ready_;
};

bool is_possible(const Shape& shape) {
  const auto refuse = [&](const char* why) {
    report(std::string(shape.kernel) + ": " + why);
    return false;
  };
  if (shape.blocks == 0) return refuse("a grid of no blocks");
  if (shape.threads == 0 || shape.threads > kMostThreads)
    return refuse("a block of no threads, or of more than 1024");
  if (shape.cluster == 0 || shape.cluster > kMostCluster || shape.blocks % shape.cluster != 0)
    return refuse(
        "a cluster of no blocks, of more than 16, or of a number that does not divide the grid");
  if (shape.cluster > 1 && (target->name == 80))
    return refuse("a cluster on a target that has none");
  if (shape.cooperative && shape.blocks > kMostTogether / shape.threads)
    return refuse("a cooperative grid of more threads than a device holds at once");
  if (shape.shared > target->shared_bytes)
    return refuse("more dynamic shared memory than the target has");
  return true;
}

bool Grid::run() {
  if (!is_possible(shape_)) return false;
  instants.begin(shape_.cluster, shape_.threads);
  const unsigned together = shape_.cooperative ? shape_.blocks : shape_.cluster;
  everyone_.members = shape_.blocks * shape_.threads;
  // Blocks that do not run together come in any order.
  std::vector<unsigned> order(shape_.blocks / together);
  for (unsigned n = 0; n < order.size(); ++n) order[n] = n * together;
  std::shuffle(order.begin(), order.end(), random_);
  for (const unsigned first : order)
    if (!stopped_) run_together(first, together);
  return !stopped_;
}

// Memory that launches share: to make it costs more than most launches.
std::deque<Fiber> fibers;
std::deque<SharedMemory> shared_memories;

void Grid::run_together(unsigned first, unsigned count) {
  const unsigned warps = (shape_.threads + kWarpThreads - 1) / kWarpThreads;
  while (fibers.size() < size_t{count} * shape_.threads) fibers.emplace_back();
  while (shared_memories.size() < count) shared_memories.emplace_back();
  std::vector<Cluster> clusters(count / shape_.cluster);
  std::vector<Block> blocks(count);
  threads_.assign(size_t{count} * shape_.threads, {});
  ready_.clear();
  for (unsigned b = 0; b < count; ++b) {
    Block& block = blocks[b];
    block.index = first + b;
    block.live = block.group.members = shape_.threads;
    block.warps.resize(warps);
    block.cluster = &clusters[b / shape_.cluster];
    block.cluster->group.members = shape_.cluster * shape_.threads;
    block.cluster->blocks.push_back(&block);
    block.shared = &shared_memories[b];
    block.shared->clear();
    if (shape_.shared > 0) block.shared->variable(nullptr, shape_.shared, "dynamic shared memory");
    for (unsigned t = 0; t < shape_.threads; ++t) {
      ++block.warps[t / kWarpThreads].members;
      Thread& thread = threads_[size_t{b} * shape_.threads + t];
      thread.fiber = &fibers[size_t{b} * shape_.threads + t];
      thread.block = &block;
      thread.index = t;
      thread.fiber->start([](void* self) { static_cast<Grid*>(self)->body_(grid->arguments_); },
                          this);
      ready_.push_back(&thread);
    }
  }
  while (!ready_.empty() && !stopped_) {
    std::swap(ready_[random_() % ready_.size()], ready_.back());
    running = ready_.back();
    ready_.pop_back();
    running->fiber->resume();
    if (running->fiber->ended()) --running->block->live;
  }
  running = nullptr;
  if (!stopped_) report_waiting();
  for (const Block& block : blocks)
    for (const auto& [address, barrier] : block.copies)
      if (!stopped_ && (barrier.missing != 0 || barrier.waited < barrier.passed)) {
        report(std::string(shape_.kernel) + ", block " + std::to_string(block.index) +
               ": ends before a bulk copy that nobody has waited for");
        break;
      }
}

// Nothing can go on: whoever has not ended waits for threads that will not come.
void Grid::report_waiting() {
  for (const Thread& thread : threads_) {
    if (thread.fiber->ended()) continue;
    stopped_ = true;
    std::string line = where(thread);
    line += thread.waits == kCopies ? "waits for copies that do not come"
                                    : std::string("waits at a barrier of its ") + thread.waits +
                                          " that not all threads reach";
    line += at(thread.place);
    // An example of those that are missed: one that has ended, or waits elsewhere.
    for (const Thread& other : threads_) {
      const bool mate = other.block == thread.block && &other != &thread;
      if (!mate || (!other.fiber->ended() && other.place == thread.place)) continue;
      line += "; thread " + std::to_string(other.index);
      line += other.fiber->ended() ? " has ended" : " waits elsewhere" + at(other.place);
      break;
    }
    report(line);
    return;
  }
}

void Grid::barrier(Level level, Place place) {
  if (level == kGrid && !shape_.cooperative)
    stop("a barrier of a grid whose launch is not cooperative", place);
  Group& waited = group(level);
  running->waits = kLevelNames[level];
  running->place = place;
  waited.waiting.push_back(running);
  if (waited.waiting.size() == waited.members) {
    ++waited.passed;
    for (Thread* thread : waited.waiting) release(thread);
    waited.waiting.clear();
  }
  running->fiber->suspend();
}

// A thread shows its value to the lanes of its mask and, when the last of them has come, all read.
void Grid::meet(Place place) {
  const unsigned lane = running->index % kWarpThreads;
  if (!(running->mask >> lane & 1)) stop("a lane that is not in the mask it names", place);
  Thread* const warp = running - lane;
  const unsigned lanes = std::min(kWarpThreads, shape_.threads - (running->index - lane));
  if (lanes < kWarpThreads && running->mask >> lanes)
    stop("a mask of lanes that are not there", place);
  running->waits = "warp";
  running->place = place;
  for (unsigned n = 0; n < lanes; ++n) {
    if (!(running->mask >> n & 1)) continue;
    // `waits` of those that have come to such a meeting; barriers leave no mask.
    const Thread& other = warp[n];
    if (!other.waits || other.mask == 0) {
      running->fiber->suspend();
      return;
    }
    if (other.mask != running->mask || other.votes != running->votes)
      stop("lanes of a warp meet with different masks or operations; lane " + std::to_string(n) +
               " is at " + line_of(other.place),
           place);
  }
  const uint32_t mask = running->mask;
  uint32_t votes = 0;
  for (unsigned n = 0; n < lanes; ++n)
    if (mask >> n & 1 && warp[n].value) votes |= 1u << n;
  for (unsigned n = 0; n < lanes; ++n)
    if (mask >> n & 1) warp[n].result = warp[n].votes ? votes : warp[warp[n].source].value;
  for (unsigned n = 0; n < lanes; ++n) {
    if (!(mask >> n & 1)) continue;
    warp[n].mask = 0;
    release(&warp[n]);
  }
  running->fiber->suspend();
}

uint32_t Grid::instant() {
  const unsigned passed[] = {group(kWarp).passed, group(kBlock).passed, group(kCluster).passed,
                             group(kGrid).passed};
  const unsigned sum = passed[0] + passed[1] + passed[2] + passed[3];
  if (running->instant == 0 || running->passed != sum) {
    running->passed = sum;
    running->instant = instants.add(
        {running->block->index, running->index, {passed[0], passed[1], passed[2], passed[3]}});
  }
  return running->instant;
}

CopyBarrier& Grid::copies_of(const void* barrier, Place place, unsigned& source) {
  auto& all = running->block->copies;
  for (size_t n = 0; n < all.size(); ++n) {
    source = kOwnCopies + 1 + static_cast<unsigned>(n);
    if (all[n].first == barrier) return all[n].second;
  }
  stop("a barrier of copies that has not been made", place);
}

void Grid::pass_if_complete(CopyBarrier& barrier) {
  if (!barrier.expecting || barrier.missing != 0) return;
  ++barrier.passed;
  barrier.expecting = false;
  barrier.arrival = 0;
  for (Thread* thread : barrier.waiting) release(thread);
  barrier.waiting.clear();
}

void Grid::wait_for_copies(const void* address, unsigned parity, Place place) {
  unsigned source = 0;
  CopyBarrier& barrier = copies_of(address, place, source);
  if (barrier.passed % 2 == parity) {
    running->waits = kCopies;
    running->place = place;
    barrier.waiting.push_back(running);
    running->fiber->suspend();
  }
  barrier.waited = barrier.passed;
  instants.wait(running->block->index, running->index, source, barrier.passed);
}

void Grid::race(const Conflict& conflict, const Region& region, size_t byte, bool writes,
                Place place) {
  const Instant& other = instants[conflict.with.instant];
  if (other.source != 0) {
    say(std::string("race: ") + (writes ? "writes" : "reads") + " byte " + std::to_string(byte) +
            " of " + region.name + ", which a copy brings at " + line_of(place_of(conflict.with)) +
            " that this thread has not waited for",
        place);
    return;
  }
  say(std::string("race: ") + (writes ? "writes" : "reads") + " byte " + std::to_string(byte) +
          " of " + region.name + ", which block " + std::to_string(other.block) + ", thread " +
          std::to_string(other.thread) +
          (conflict.kind == Conflict::kWritten ? " has written" : " has read") + " at " +
          line_of(place_of(conflict.with)) + " without a barrier between",
      place);
}

}  // namespace

int64_t limit_of(Limit limit) {
  const int64_t said = limits[static_cast<int>(limit)];
  if (said > 0) return said;
  if (limit == Limit::kMultiprocessors) return 8;
  if (limit == Limit::kShared) return static_cast<int64_t>(target->shared_bytes);
  return target->name == 80 ? 1 : target->name == 120 ? kPortableCluster : kMostCluster;
}

bool run_grid(const Shape& shape, void (*body)(void*), void* arguments) {
  if (lists_launches)
    launches += std::string(shape.kernel) + " " + std::to_string(shape.blocks) + "\n";
  Grid here(shape, body, arguments);
  grid = &here;
  const bool done = here.run();
  grid = nullptr;
  running = nullptr;
  return done;
}

Position position() {
  const Shape& shape = grid->shape();
  return {running->block->index, shape.blocks, running->index, shape.threads};
}

void barrier(Level level) { grid->barrier(level, __builtin_return_address(0)); }

uint64_t exchange(unsigned source, uint64_t value) {
  Thread* const self = running;
  self->mask = ~uint32_t{0};
  self->source = source;
  self->value = value;
  self->votes = false;
  grid->meet(__builtin_return_address(0));
  return self->result;
}

uint32_t ballot(uint32_t mask, bool value) {
  Thread* const self = running;
  self->mask = mask;
  self->value = value;
  self->votes = true;
  grid->meet(__builtin_return_address(0));
  return static_cast<uint32_t>(self->result);
}

namespace {

void* variable_of_block(const void* key, size_t bytes, const char* name, Place place) {
  SharedMemory& shared = *running->block->shared;
  char* const variable = shared.variable(key, bytes, name);
  if (shared.bytes() > target->shared_bytes || !variable)
    grid->stop("more shared memory than sm_" + std::to_string(target->name) +
                   " has: " + std::to_string(shared.bytes()) + " bytes of " +
                   std::to_string(target->shared_bytes),
               place);
  return variable;
}

void check_alignment(const void* address, size_t bytes, Place place) {
  if (reinterpret_cast<uintptr_t>(address) % bytes != 0)
    grid->stop(
        "an access of " + std::to_string(bytes) + " bytes at an address that is no multiple of it",
        place);
}

}  // namespace

void* shared_variable(const void* key, size_t bytes, const char* name) {
  return variable_of_block(key, bytes, name, __builtin_return_address(0));
}

void* dynamic_shared() {
  const size_t bytes = grid->shape().shared;
  if (bytes == 0)
    grid->stop("dynamic shared memory that the launch has not asked for",
               __builtin_return_address(0));
  return variable_of_block(nullptr, bytes, "", __builtin_return_address(0));
}

void* shared_of(const void* address, unsigned rank) {
  const std::vector<Block*>& blocks = running->block->cluster->blocks;
  const auto* byte = static_cast<const char*>(address);
  if (rank >= blocks.size())
    grid->stop("shared memory of a block that its cluster does not have",
               __builtin_return_address(0));
  if (!running->block->shared->owns(byte))
    grid->stop("an address that is not in this block's shared memory", __builtin_return_address(0));
  return blocks[rank]->shared->of(*running->block->shared, byte);
}

void expect_aligned(const void* address, size_t bytes) {
  check_alignment(address, bytes, __builtin_return_address(0));
}

namespace {

constexpr size_t kCopyUnit = 16;
constexpr size_t kBarrierBytes = 8;

// Where no array of the caller's is known, sanitizers watch in place of the host.
void watch(const void* address, size_t bytes, bool writes, bool aligned, Place place) {
  if (!global.empty()) access(address, bytes, writes, aligned, place);
}

// What a copy of this thread writes is there for those who wait for so many arrivals.
uint32_t arrival(unsigned source, unsigned arrivals) {
  Instant instant = instants[grid->instant()];
  instant.source = source;
  instant.arrivals = arrivals;
  return instants.add(instant);
}

// Writes what comes at an instant, as its thread may when it begins the copy.
void bring(void* to, const void* from, size_t bytes, uint32_t instant, Place place) {
  watch(from, bytes, false, false, place);
  watch(to, bytes, true, false, place);
  if (!running->block->shared->owns(static_cast<char*>(to)))
    grid->stop("a copy to what is not this block's shared memory", place);
  Region& region = *running->block->shared->before(static_cast<char*>(to));
  const auto first = static_cast<size_t>(static_cast<char*>(to) - region.begin);
  for (size_t byte = first; byte < first + bytes; ++byte)
    region.shadow[byte].writer = access_at(instant, place);
}

}  // namespace

void init_copies(void* barrier) {
  const Place place = __builtin_return_address(0);
  check_alignment(barrier, kBarrierBytes, place);
  watch(barrier, kBarrierBytes, true, true, place);
  running->block->copies.emplace_back(barrier, CopyBarrier{});
}

void expect_copies(void* address, size_t bytes) {
  const Place place = __builtin_return_address(0);
  unsigned source = 0;
  CopyBarrier& barrier = grid->copies_of(address, place, source);
  watch(address, kBarrierBytes, false, true, place);
  if (barrier.expecting) grid->stop("expects copies twice before the first ones have come", place);
  barrier.expecting = true;
  barrier.missing += static_cast<int64_t>(bytes);
  grid->pass_if_complete(barrier);
}

void bulk_copy(void* to, const void* from, size_t bytes, void* address) {
  const Place place = __builtin_return_address(0);
  unsigned source = 0;
  CopyBarrier& barrier = grid->copies_of(address, place, source);
  watch(address, kBarrierBytes, false, true, place);
  for (const void* place_in_memory : {static_cast<const void*>(to), from})
    check_alignment(place_in_memory, kCopyUnit, place);
  if (bytes % kCopyUnit != 0) grid->stop("a bulk copy of no multiple of 16 bytes", place);
  if (barrier.arrival == 0) barrier.arrival = arrival(source, barrier.passed + 1);
  bring(to, from, bytes, barrier.arrival, place);
  std::memcpy(to, from, bytes);
  barrier.missing -= static_cast<int64_t>(bytes);
  grid->pass_if_complete(barrier);
}

void wait_for_copies(void* barrier, unsigned parity) {
  const Place place = __builtin_return_address(0);
  watch(barrier, kBarrierBytes, false, true, place);
  grid->wait_for_copies(barrier, parity, place);
}

void copy_16(void* to, const void* from) {
  const Place place = __builtin_return_address(0);
  for (const void* address : {static_cast<const void*>(to), from})
    check_alignment(address, kCopyUnit, place);
  bring(to, from, kCopyUnit, arrival(kOwnCopies, running->groups + 1), place);
  Thread::Copy copy{to, {}, running->groups + 1};
  std::memcpy(copy.bytes, from, kCopyUnit);
  running->copies.push_back(copy);
}

void end_copy_group() { ++running->groups; }

void wait_for_copy_groups(unsigned left) {
  Thread& self = *running;
  if (self.groups > left) self.groups_waited = std::max(self.groups_waited, self.groups - left);
  while (!self.copies.empty() && self.copies.front().group <= self.groups_waited) {
    std::memcpy(self.copies.front().to, self.copies.front().bytes, kCopyUnit);
    self.copies.pop_front();
  }
  instants.wait(self.block->index, self.index, kOwnCopies, self.groups_waited);
}

void access(const void* address, size_t bytes, bool writes, bool aligned, Place place) {
  if (!running || running->fiber->owns(address)) return;
  if (aligned) check_alignment(address, bytes, place);
  const auto* first = static_cast<const char*>(address);
  Region* region = global.before(first);
  for (const Block* block : running->block->cluster->blocks) {
    if (!block->shared->owns(first)) continue;
    region = block->shared->before(first);
    if (block->live == 0) grid->stop("uses shared memory of a block that has ended", place);
  }
  const std::string verb = writes ? "writes" : "reads";
  const auto offset = region ? static_cast<size_t>(first - region->begin) : 0;
  if (!region || offset > region->bytes + kNear)
    grid->stop(verb + " memory that is nobody's", place);
  if (offset + bytes > region->bytes)
    grid->stop(verb + " " + std::to_string(bytes) + " bytes at byte " + std::to_string(offset) +
                   " of " + region->name + ", which has " + std::to_string(region->bytes),
               place);
  if (writes && region->kind == Kind::kConstant)
    grid->stop("writes " + region->name + ", which is constant", place);
  const Access here = access_at(grid->instant(), place);
  bool said = false;
  for (size_t byte = offset; byte < offset + bytes; ++byte) {
    ShadowByte& shadow = region->shadow[byte];
    const bool empty = region->kind == Kind::kShared && !writes && shadow.writer.instant == 0;
    const Conflict conflict = record(instants, shadow, here, writes);
    // One line tells of all bytes.
    if (said) continue;
    if (empty)
      grid->say("reads byte " + std::to_string(byte) + " of " + region->name +
                    ", which nobody has written",
                place);
    if (conflict.kind != Conflict::kNone) grid->race(conflict, *region, byte, writes, place);
    said = empty || conflict.kind != Conflict::kNone;
  }
}

}  // namespace nabla_fast::host

using namespace nabla_fast::host;

int32_t nabla_fast_host_configure(uint64_t new_seed, int32_t name) {
  for (const Target& known : kTargets) {
    if (known.name != name) continue;
    seed = new_seed;
    target = &known;
    return 1;
  }
  return 0;
}

void nabla_fast_host_limit(int32_t multiprocessors, int64_t shared_bytes, int32_t most_cluster) {
  limits[static_cast<int>(Limit::kMultiprocessors)] = multiprocessors;
  limits[static_cast<int>(Limit::kShared)] = shared_bytes;
  limits[static_cast<int>(Limit::kCluster)] = most_cluster;
}

void nabla_fast_host_register(const void* memory, int64_t bytes, const char* name,
                              int32_t constant) {
  global.add(memory, static_cast<size_t>(bytes), name, constant ? Kind::kConstant : Kind::kGlobal);
}

void nabla_fast_host_forget(void) { global.clear(); }

const char* nabla_fast_host_reports(void) { return reports().c_str(); }

void nabla_fast_host_clear_reports(void) { clear_reports(); }

void nabla_fast_host_list_launches(int32_t listed) {
  lists_launches = listed != 0;
  if (lists_launches) launches.clear();
}

const char* nabla_fast_host_launches(void) { return launches.c_str(); }
