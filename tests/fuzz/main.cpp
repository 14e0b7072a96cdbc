// Runs random cases: each named function in turn, on each level of instructions, on several threads.
//
//   fuzz [--seed N] [--seconds N] [--cases N] [--threads N] [--function NAME] [--case N] [--list]
//
// It stops after --cases cases of each function, or after --seconds, whichever is first. A failure names
// the case; --function NAME --case N with the same seed runs it alone.

#include <algorithm>
#include <chrono>
#include <cinttypes>
#include <csignal>
#include <cstdio>
#include <thread>

#include "bytes.h"
#include "fuzz.h"

namespace fuzz {

namespace {

struct Running {
  const char* name = "";
  int64_t number = 0;
  nabla_fast_isa isa = 0;
};

thread_local Running running;
Running latest;  // of any thread: kernels' own threads run no case
uint64_t seed = 1;

uint64_t hash(const char* name) {
  uint64_t value = 14695981039346656037u;
  for (; *name; ++name) value = (value ^ static_cast<unsigned char>(*name)) * 1099511628211u;
  return value;
}

void report() {
  const Running& of = *running.name ? running : latest;
  std::fprintf(stderr, "fuzz: in --seed %" PRIu64 " --function %s --case %" PRId64 ", isa %d\n",
               seed, of.name, of.number, of.isa);
}

void run(const Case& function, int64_t number) {
  running = {function.name, number, nabla_fast_cpu_isa()};
#ifdef NABLA_FAST_FUZZ_GUARDED
  latest = running;
#endif
  Random random(Random(seed ^ hash(function.name)).next() ^ static_cast<uint64_t>(number));
  function.run(random);
}

}  // namespace

void check(bool good, const char* what) {
  if (good) return;
  std::fprintf(stderr, "fuzz: %s\n", what);
  report();
  std::abort();
}

std::vector<Case>& cases() {
  static std::vector<Case> all;
  return all;
}

}  // namespace fuzz

#ifdef NABLA_FAST_FUZZ_GUARDED
// What touches a guard page ends here. Nothing is left to lose, so printing is no risk.
extern "C" void on_guard_page(int number) {
  std::fprintf(stderr, "fuzz: memory beside a tensor was touched\n");
  fuzz::report();
  std::signal(number, SIG_DFL);
  std::raise(number);
}
#endif

#ifdef __SANITIZE_ADDRESS__
// AddressSanitizer's report is followed by ours.
extern "C" void __asan_on_error() { fuzz::report(); }
#endif

int main(int count, char** arguments) {
  using namespace fuzz;
#ifdef NABLA_FAST_FUZZ_GUARDED
  for (const int fault : {SIGSEGV, SIGBUS}) std::signal(fault, on_guard_page);
#endif
  int64_t seconds = 60, most = 1000, threads = 1, only = -1;
  const char* name = nullptr;
  for (int n = 1; n < count; ++n) {
    const std::string option = arguments[n];
    if (option == "--list") {
      for (const Case& function : cases()) std::printf("%s\n", function.name);
      return 0;
    }
    if (++n == count) {
      std::fprintf(stderr, "fuzz: %s needs a value\n", option.c_str());
      return 2;
    }
    const int64_t value = std::atoll(arguments[n]);
    if (option == "--seed") {
      seed = static_cast<uint64_t>(value);
    } else if (option == "--seconds") {
      seconds = value;
    } else if (option == "--cases") {
      most = value;
    } else if (option == "--threads") {
      threads = value;
    } else if (option == "--case") {
      only = value;
    } else if (option == "--function") {
      name = arguments[n];
    } else {
      std::fprintf(stderr, "fuzz: no option %s\n", option.c_str());
      return 2;
    }
  }
  std::vector<Case> chosen;
  for (const Case& function : cases())
    if (!name || std::string(name) == function.name) chosen.push_back(function);
  if (chosen.empty()) {
    std::fprintf(stderr, "fuzz: no function %s\n", name);
    return 2;
  }
  // So that the order of the files does not matter.
  std::sort(chosen.begin(), chosen.end(),
            [](const Case& a, const Case& b) { return std::strcmp(a.name, b.name) < 0; });

  const nabla_fast_isa best = nabla_fast_cpu_isa();
  const auto begin = std::chrono::steady_clock::now();
  const auto over = [&] {
    return std::chrono::steady_clock::now() - begin > std::chrono::seconds(seconds);
  };
  int64_t number = only >= 0 ? only : 0, done = 0;
  const int64_t last = only >= 0 ? only + 1 : most;
  for (; number < last && !over(); number += threads) {
    for (const Case& function : chosen) {
      if (over()) break;
      // A round is of one level; the level of a round is that of its number, so that a case run
      // alone has the level it had.
      const int64_t round = number / threads * threads;
      nabla_fast_limit_cpu_isa(static_cast<nabla_fast_isa>(round / threads % (best + 1)));
      std::vector<std::thread> others;
      const auto next = [&](int64_t offset) {
        if (number + offset < last) run(function, number + offset);
      };
      for (int64_t n = 1; n < threads; ++n) others.emplace_back(next, n);
      next(0);
      for (std::thread& other : others) other.join();
      done += std::min(threads, last - number);
    }
  }
  const std::chrono::duration<double> passed = std::chrono::steady_clock::now() - begin;
  std::printf("fuzz: %" PRId64 " cases of %zu functions in %.0f s, seed %" PRIu64 "\n", done,
              chosen.size(), passed.count(), seed);
  return 0;
}
