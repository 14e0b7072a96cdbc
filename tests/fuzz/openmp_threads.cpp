// The part of OpenMP's run time that kernels call, on std::thread: ThreadSanitizer sees nothing of how
// libgomp's threads wait for each other, and takes all that they share for races.
//
// Chunks of a loop are handed out without an order between the threads, so that nothing hides a race
// of two chunks. A call that is missing here is an error when the driver is linked.

#include <atomic>
#include <condition_variable>
#include <map>
#include <mutex>
#include <thread>
#include <vector>

namespace {

struct Loop {
  std::atomic<long> next;
  long end, step;
};

struct Team {
  explicit Team(unsigned threads) : size(threads) {}

  void meet() {
    std::unique_lock<std::mutex> lock(mutex);
    const unsigned turn = turns;
    if (++waiting == size) {
      waiting = 0;
      ++turns;
      all_here.notify_all();
    } else {
      all_here.wait(lock, [&] { return turns != turn; });
    }
  }

  const unsigned size;
  std::mutex mutex;
  std::condition_variable all_here;
  unsigned waiting = 0, turns = 0;
  std::map<int, Loop> loops;  // by how many a thread has been through
};

struct Member {
  Team* team = nullptr;
  int rank = 0;
  int loops = 0;
  Loop* loop = nullptr;
};

thread_local Member self;
std::mutex critical;

constexpr int kThreads = 3;

bool take(long* begin, long* end) {
  Loop& loop = *self.loop;
  const long first = loop.next.fetch_add(loop.step, std::memory_order_relaxed);
  if (first >= loop.end) return false;
  *begin = first;
  *end = first + loop.step < loop.end ? first + loop.step : loop.end;
  return true;
}

}  // namespace

extern "C" {

int omp_get_max_threads(void) { return kThreads; }
int omp_get_num_procs(void) { return kThreads; }
int omp_get_thread_num(void) { return self.rank; }
int omp_get_num_threads(void) { return self.team ? static_cast<int>(self.team->size) : 1; }
int omp_in_parallel(void) { return omp_get_num_threads() > 1; }

void GOMP_parallel(void (*work)(void*), void* data, unsigned threads, unsigned) {
  Team team(threads ? threads : kThreads);
  std::vector<std::thread> others;
  for (unsigned rank = 1; rank < team.size; ++rank) {
    others.emplace_back([&team, work, data, rank] {
      self = Member{&team, static_cast<int>(rank)};
      work(data);
    });
  }
  const Member outer = self;
  self = Member{&team};
  work(data);
  for (std::thread& other : others) other.join();
  self = outer;
}

void GOMP_barrier(void) {
  if (self.team) self.team->meet();
}

// Loops have a positive step and end behind their beginning, as gcc makes them of ours.
bool GOMP_loop_nonmonotonic_dynamic_start(long begin, long end, long step, long chunk, long* first,
                                          long* last) {
  Team& team = *self.team;
  {
    const std::lock_guard<std::mutex> lock(team.mutex);
    const auto [loop, made] = team.loops.try_emplace(self.loops++);
    if (made) {
      loop->second.next.store(begin, std::memory_order_relaxed);
      loop->second.end = end;
      loop->second.step = step * chunk;
    }
    self.loop = &loop->second;
  }
  return take(first, last);
}

bool GOMP_loop_nonmonotonic_dynamic_next(long* first, long* last) { return take(first, last); }

void GOMP_loop_end(void) { GOMP_barrier(); }
void GOMP_loop_end_nowait(void) {}

void GOMP_critical_name_start(void**) { critical.lock(); }
void GOMP_critical_name_end(void**) { critical.unlock(); }
void GOMP_critical_start(void) { critical.lock(); }
void GOMP_critical_end(void) { critical.unlock(); }

}  // extern "C"
