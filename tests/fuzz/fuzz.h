// Random calls of the functions of nabla_fast.h.
//
// A function has a file of its own with one or more of
//
//   FUZZ(token_stats) {                        // one case; `random` is its source of numbers
//     Matrix<float> logits(random, rows, vocab);
//     ...
//     check(status == NABLA_FAST_OK, "refused what is right");
//   }
//
// A case depends on the seed, its name and its number alone. Memory is allocated to the byte, and what
// lies between the rows of a tensor is poisoned, so that AddressSanitizer sees every access beside it.
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

#ifdef __SANITIZE_ADDRESS__
  #include <sanitizer/asan_interface.h>
#else
  #define ASAN_POISON_MEMORY_REGION(address, bytes) (static_cast<void>(0))
  #define ASAN_UNPOISON_MEMORY_REGION(address, bytes) (static_cast<void>(0))
#endif

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

// -- memory

// Exactly `count` elements on the heap, at any address that suits them.
template <typename T>
class Memory {
 public:
  Memory() = default;
  Memory(Random& random, int64_t count) : count_(count) {
    shift_ = static_cast<size_t>(random.pick<int64_t>({0, 0, 1, 3})) * sizeof(T);
    base_.resize(shift_ + static_cast<size_t>(count) * sizeof(T));
    base_.shrink_to_fit();
    std::fill(base_.begin(), base_.end(), static_cast<char>(random.next()));
  }
  T* data() { return reinterpret_cast<T*>(base_.data() + shift_); }
  const T* data() const { return reinterpret_cast<const T*>(base_.data() + shift_); }
  int64_t count() const { return count_; }
  T& operator[](int64_t n) { return data()[n]; }
  const T& operator[](int64_t n) const { return data()[n]; }

 private:
  std::vector<char> base_;
  size_t shift_ = 0;
  int64_t count_ = 0;
};

// Workspace bytes anywhere, filled with one byte.
class Workspace {
 public:
  Workspace(Random& random, int64_t bytes, int fill)
      : shift_(static_cast<size_t>(random.between(0, 5))),
        base_(shift_ + static_cast<size_t>(bytes), static_cast<char>(fill)) {
    base_.shrink_to_fit();
  }
  void* data() { return base_.data() + shift_; }

 private:
  size_t shift_;
  std::vector<char> base_;
};

// A tensor with up to three outer axes in any order in memory, rows of `columns` that are poisoned
// behind, and strides that may be negative.
template <typename T>
class Tensor {
 public:
  Tensor(Random& random, std::vector<int64_t> sizes, int64_t columns)
      : sizes_(std::move(sizes)), strides_(sizes_.size()), columns_(columns) {
    const size_t axes = sizes_.size();
    std::vector<size_t> order(axes);
    for (size_t n = 0; n < axes; ++n) order[n] = n;
    for (size_t n = axes; n > 1; --n)
      std::swap(order[n - 1],
                order[static_cast<size_t>(random.between(0, static_cast<int64_t>(n) - 1))]);
    int64_t stride = columns + random.pick<int64_t>({0, 0, 1, 3, 16, 61});
    int64_t span = columns, first = 0;
    for (const size_t axis : order) {
      strides_[axis] = random.one_in(6) ? -stride : stride;
      const int64_t extent = stride * (sizes_[axis] - 1);
      span += extent > 0 ? extent : 0;
      if (strides_[axis] < 0 && extent > 0) first += extent;
      stride = sizes_[axis] > 0 ? stride * sizes_[axis] : stride;
      // Nothing lies a stride away from the only one: any number will do.
      if (sizes_[axis] <= 1 && random.one_in(3))
        strides_[axis] = random.one_in(2) ? random.huge() : random.negative();
    }
    for (const int64_t size : sizes_)
      if (size == 0) span = 0;
    memory_ = Memory<T>(random, span);
    first_ = span > 0 ? first : 0;
    before_.assign(memory_.data(), memory_.data() + span);
    poison();
  }
  Tensor(const Tensor&) = delete;
  Tensor& operator=(const Tensor&) = delete;
  ~Tensor() { ASAN_UNPOISON_MEMORY_REGION(memory_.data(), bytes()); }

  T* data() { return memory_.data() + first_; }
  int64_t stride(size_t axis) const { return strides_[axis]; }
  int64_t size(size_t axis) const { return sizes_[axis]; }
  int64_t columns() const { return columns_; }
  T* row(std::initializer_list<int64_t> index) {
    int64_t at = 0;
    size_t axis = 0;
    for (const int64_t n : index) at += n * strides_[axis++];
    return data() + at;
  }
  T* row(int64_t n) { return row({n}); }

  // fill(row) of every row, and what is between them becomes poison.
  template <typename Fill>
  void each_row(const Fill& fill) {
    ASAN_UNPOISON_MEMORY_REGION(memory_.data(), bytes());
    visit(fill);
    before_.assign(memory_.data(), memory_.data() + memory_.count());
    poison();
  }
  // Whether not a byte has changed since each_row() or the constructor.
  bool untouched() {
    ASAN_UNPOISON_MEMORY_REGION(memory_.data(), bytes());
    const bool same = bytes() == 0 || !std::memcmp(before_.data(), memory_.data(), bytes());
    poison();
    return same;
  }
  // The elements of all rows, one behind the other.
  std::vector<T> elements() {
    std::vector<T> all;
    visit([&](T* row) { all.insert(all.end(), row, row + columns_); });
    return all;
  }
  // Puts back what elements() gave.
  void put(const std::vector<T>& all) {
    auto from = all.begin();
    visit([&](T* row) {
      std::copy(from, from + columns_, row);
      from += columns_;
    });
  }

 private:
  size_t bytes() const { return static_cast<size_t>(memory_.count()) * sizeof(T); }
  template <typename Work>
  void visit(const Work& work) {
    std::vector<int64_t> index(sizes_.size(), 0);
    for (const int64_t size : sizes_)
      if (size == 0) return;
    for (bool more = true; more;) {
      int64_t at = 0;
      for (size_t axis = 0; axis < index.size(); ++axis) at += index[axis] * strides_[axis];
      work(data() + at);
      more = false;
      for (size_t axis = index.size(); axis-- > 0 && !more;) {
        more = ++index[axis] < sizes_[axis];
        if (!more) index[axis] = 0;
      }
    }
  }
  void poison() {
    ASAN_POISON_MEMORY_REGION(memory_.data(), bytes());
    visit([&]([[maybe_unused]] T* row) {
      ASAN_UNPOISON_MEMORY_REGION(row, static_cast<size_t>(columns_) * sizeof(T));
    });
  }

  std::vector<int64_t> sizes_, strides_;
  int64_t columns_, first_ = 0;
  Memory<T> memory_;
  std::vector<T> before_;
};

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

template <typename T>
bool same(const std::vector<T>& a, const std::vector<T>& b) {
  return a.size() == b.size() && same(a.data(), b.data(), static_cast<int64_t>(a.size()));
}

template <typename T>
bool same(const Memory<T>& a, const Memory<T>& b) {
  return a.count() == b.count() && same(a.data(), b.data(), a.count());
}

// Whether a status refuses a call, as against saying something of a row.
inline bool refuses(nabla_fast_status status) {
  return status >= NABLA_FAST_INVALID_SHAPE && status != NABLA_FAST_BAD_ROWS;
}

}  // namespace fuzz

#endif  // NABLA_FAST_FUZZ_H_
