// Random calls of the functions of nabla_fast.h.
//
// An op has a file of its own with one or more of
//
//   FUZZ(token_stats) {                        // one case; `random` is its source of numbers
//     Matrix logits(random, rows, vocab, dtype(random));
//     Call<nabla_fast_stats_args> call(random, nabla_fast_token_stats);
//     call.reads(By::kRows, call.args.logits, logits);
//     ...
//   }
//
// where Call (call.h) knows what holds for every function, from the arrays that it reads and writes. A
// case depends on the seed, its name and its number alone.
#ifndef NABLA_FAST_FUZZ_H_
#define NABLA_FAST_FUZZ_H_

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <initializer_list>
#include <limits>
#include <string>
#include <type_traits>
#include <utility>
#include <vector>

#include "nabla_fast.h"

namespace fuzz {

constexpr float kInfinity = std::numeric_limits<float>::infinity();
constexpr float kNaN = std::numeric_limits<float>::quiet_NaN();

class Random {
 public:
  explicit Random(uint64_t seed) : state_(seed) {}

  uint64_t next() {
    uint64_t x = state_ += 0x9E3779B97F4A7C15u;
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9u;
    x = (x ^ (x >> 27)) * 0x94D049BB133111EBu;
    return x ^ (x >> 31);
  }
  // Both ends are drawn too.
  int64_t between(int64_t low, int64_t high) {
    return low + static_cast<int64_t>(next() % static_cast<uint64_t>(high - low + 1));
  }
  bool one_in(int64_t n) { return between(1, n) == 1; }
  double uniform() { return static_cast<double>(next() >> 11) * 0x1p-53; }
  template <typename T>
  T pick(std::initializer_list<T> of) {
    return of.begin()[between(0, static_cast<int64_t>(of.size()) - 1)];
  }
  // A size that the kernels' blocks do not divide, more often small than large.
  int64_t size(int64_t most) {
    const int64_t bound = int64_t{1} << between(0, 16);
    return between(1, bound < most ? bound : most);
  }
  int64_t negative() { return pick<int64_t>({-1, -2, -1000, INT64_MIN, INT64_MIN + 1}); }
  // A size with which no tensor has a place in memory.
  int64_t huge() {
    return pick<int64_t>({INT64_MAX, INT64_MAX - 1, INT64_MAX / 2, INT64_MAX / 4 + 1,
                          int64_t{1} << 62, int64_t{1} << 56});
  }
  int32_t threads() { return pick<int32_t>({1, 1, 2, 3, 0, -1, 4}); }
  double tau() { return pick({1.0, 1.0, 0.7, 0.1, 10.0, 0x1p-64, 0x1p64}); }
  double wrong_tau() {
    return pick({0.0, -1.0, 0x1p-65, 0x1p65, HUGE_VAL, -HUGE_VAL, double{kNaN}});
  }

 private:
  uint64_t state_;
};

// Ends the process, with the case to run again, unless `good`.
void check(bool good, const char* what);

struct Case {
  const char* name;
  void (*run)(Random& random);
};

// All cases, in the order of their names.
std::vector<Case>& cases();

struct Registered {
  Registered(const char* name, void (*run)(Random&)) { cases().push_back({name, run}); }
};

#define FUZZ(NAME)                                               \
  static void fuzz_##NAME(Random& random);                       \
  static const Registered registered_##NAME{#NAME, fuzz_##NAME}; \
  static void fuzz_##NAME(Random& random)

// -- values

// What the rows of a tensor hold. Most are plain; a few have what a kernel must live with.
class Values {
 public:
  explicit Values(Random& random)
      : random_(random), scale_(random.pick({1.0, 1.0, 3.0, 100.0, 0.0, 1e-40, 1e30})) {}

  float plain() { return static_cast<float>(scale_ * (2 * random_.uniform() - 1)); }
  void fill_plain(float* row, int64_t n) {
    for (int64_t i = 0; i < n; ++i) row[i] = plain();
  }
  void fill_plain(uint16_t* row, int64_t n) {
    for (int64_t i = 0; i < n; ++i) row[i] = bf16(plain());
  }
  // With masked tokens, and now and then what makes a row have no answer.
  template <typename T>
  void fill_logits(T* row, int64_t n) {
    fill_plain(row, n);
    const int64_t last = n - 1;
    if (random_.one_in(3))
      for (int64_t i = 0; i < n; ++i)
        if (random_.one_in(2)) set(row[i], -kInfinity);
    if (random_.one_in(12)) set(row[random_.between(0, last)], kNaN);
    if (random_.one_in(12)) set(row[random_.between(0, last)], kInfinity);
    if (random_.one_in(12))
      for (int64_t i = 0; i < n; ++i) set(row[i], -kInfinity);
  }

  static void set(float& to, float value) { to = value; }
  static void set(uint16_t& to, float value) { to = bf16(value); }
  static uint16_t bf16(float value) {
    uint32_t bits;
    std::memcpy(&bits, &value, sizeof bits);
    return static_cast<uint16_t>(bits >> 16);
  }
  static float wide(float value) { return value; }
  static float wide(uint16_t bf16) {
    const uint32_t bits = uint32_t{bf16} << 16;
    float value;
    std::memcpy(&value, &bits, sizeof value);
    return value;
  }

 private:
  Random& random_;
  double scale_;
};

// What the status of a row of logits is.
template <typename T>
nabla_fast_status status_of(const T* row, int64_t n) {
  bool infinite = false, finite = false;
  for (int64_t i = 0; i < n; ++i) {
    const float value = Values::wide(row[i]);
    if (std::isnan(value)) return NABLA_FAST_ROW_NAN;
    infinite |= value == kInfinity;
    finite |= std::isfinite(value);
  }
  return infinite ? NABLA_FAST_ROW_INFINITE : finite ? NABLA_FAST_OK : NABLA_FAST_ROW_ALL_MASKED;
}

// The index of the largest of values without NaN, the first of equal ones.
template <typename T>
int64_t argmax(const T* row, int64_t n) {
  int64_t best = 0;
  for (int64_t i = 1; i < n; ++i)
    if (Values::wide(row[i]) > Values::wide(row[best])) best = i;
  return best;
}

// Whether two results have the same bits. NaNs are alike.
template <typename T>
bool same(const T* a, const T* b, int64_t n) {
  for (int64_t i = 0; i < n; ++i) {
    if constexpr (std::is_floating_point_v<T>)
      if (std::isnan(a[i]) && std::isnan(b[i])) continue;
    if (std::memcmp(a + i, b + i, sizeof(T))) return false;
  }
  return true;
}

// Whether a status refuses a call, as against saying something of a row.
inline bool refuses(nabla_fast_status status) {
  return status >= NABLA_FAST_INVALID_SHAPE && status != NABLA_FAST_BAD_ROWS;
}

}  // namespace fuzz

#endif  // NABLA_FAST_FUZZ_H_
