#include "base/overlap.h"

#include <algorithm>

namespace nabla_fast {
namespace {

constexpr int kAxes = Array::kMostAxes;

// Array whose strides are positive and fall from axis to axis; axes that it does not have count 1.
struct Runs {
  int64_t first, run;
  Axis axes[kAxes];
  int64_t extent[kAxes + 1];  // bytes from the first one on, of axis n and those behind it

  // joined: with as few runs as can be, each of bytes that may be several elements'.
  Runs(const Array& array, bool joined) : first(array.first), run(array.run) {
    int count = 0;
    for (int n = 0; n < array.axis_count; ++n) {
      Axis axis = array.axes[n];
      if (axis.stride == 0) continue;  // the same bytes again
      if (axis.stride < 0) {
        first = Array::moved(first, (axis.count - 1) * axis.stride);
        axis.stride = -axis.stride;
      }
      int place = count++;
      for (; place > 0 && axes[place - 1].stride < axis.stride; --place)
        axes[place] = axes[place - 1];
      axes[place] = axis;
    }
    for (; joined && count > 0 && axes[count - 1].stride <= run; --count)
      run += (axes[count - 1].count - 1) * axes[count - 1].stride;
    std::fill(axes + count, axes + kAxes, Axis{1, 1});
    extent[kAxes] = run;
    for (int n = kAxes - 1; n >= 0; --n)
      extent[n] = extent[n + 1] + (axes[n].count - 1) * axes[n].stride;
  }

  int64_t runs() const { return (Size(axes[0].count) * axes[1].count * axes[2].count).or_most(); }

  // Number of runs with a byte in [low, high), at most `most`: of the axes from kAxis on, with the
  // first run at `at`.
  template <int kAxis>
  int64_t count_in(int64_t low, int64_t high, int64_t most, int64_t at) const {
    if constexpr (kAxis == kAxes) {
      return at < high && at + run > low;
    } else {
      if (at >= high || at + extent[kAxis] <= low) return 0;
      const auto [count, stride] = axes[kAxis];
      const int64_t below = low - at - extent[kAxis + 1];
      const int64_t begin = below < 0 ? 0 : below / stride + 1;
      const int64_t end = std::min(count, (high - at - 1) / stride + 1);
      int64_t found = 0;
      for (int64_t n = begin; n < end && found < most; ++n)
        found += count_in<kAxis + 1>(low, high, most - found, at + n * stride);
      return found;
    }
  }

  // True if a run has bytes of more than `most` runs of another array.
  bool meets_more_than(int64_t most, const Runs& other) const {
    for (int64_t i = 0; i < axes[0].count; ++i)
      for (int64_t j = 0; j < axes[1].count; ++j)
        for (int64_t k = 0; k < axes[2].count; ++k) {
          const int64_t at = first + i * axes[0].stride + j * axes[1].stride + k * axes[2].stride;
          if (other.count_in<0>(at, at + run, most + 1, other.first) > most) return true;
        }
    return false;
  }
};

}  // namespace

bool have_common_byte(const Array& a, const Array& b) {
  const Runs x(a, true), y(b, true);
  return x.runs() <= y.runs() ? x.meets_more_than(0, y) : y.meets_more_than(0, x);
}

bool overlaps_itself(const Array& array) {
  for (int n = 0; n < array.axis_count; ++n)
    if (array.axes[n].stride == 0) return true;
  const Runs runs(array, false);
  bool nested = true;
  for (int n = 0; n < kAxes; ++n) {
    if (runs.axes[n].count == 1) continue;
    if (runs.axes[n].stride < runs.run) return true;
    nested = nested && runs.axes[n].stride >= runs.extent[n + 1];
  }
  // Where axes interleave, each run must meet itself alone.
  return !nested && runs.meets_more_than(1, runs);
}

}  // namespace nabla_fast
