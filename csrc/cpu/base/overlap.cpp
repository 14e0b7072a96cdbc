#include "base/overlap.h"

#include <algorithm>

namespace nabla_fast {
namespace {

// Array whose strides are positive and fall from axis to axis.
struct Runs {
  int64_t first, run;
  int axis_count = 0;
  Axis axes[Array::kMostAxes];
  int64_t extent[Array::kMostAxes + 1];  // bytes from the first one on, of axis n and those behind

  // joined: with as few runs as can be, each of bytes that may be several elements'.
  Runs(const Array& array, bool joined) : first(array.first), run(array.run) {
    for (int n = 0; n < array.axis_count; ++n) {
      Axis axis = array.axes[n];
      if (axis.stride == 0) continue;  // the same bytes again
      if (axis.stride < 0) {
        first = Array::moved(first, (axis.count - 1) * axis.stride);
        axis.stride = -axis.stride;
      }
      axes[axis_count++] = axis;
    }
    std::sort(axes, axes + axis_count,
              [](const Axis& a, const Axis& b) { return a.stride > b.stride; });
    for (; joined && axis_count > 0 && axes[axis_count - 1].stride <= run; --axis_count)
      run += (axes[axis_count - 1].count - 1) * axes[axis_count - 1].stride;
    extent[axis_count] = run;
    for (int n = axis_count - 1; n >= 0; --n)
      extent[n] = extent[n + 1] + (axes[n].count - 1) * axes[n].stride;
  }

  // Number of runs with a byte in [low, high), or `most` if there are more: of the axes from `axis`
  // on, with the first run at `at`.
  int64_t count_in(int64_t low, int64_t high, int64_t most, int axis, int64_t at) const {
    const int64_t before = at + extent[axis] - low, behind = high - at;
    if (before <= 0 || behind <= 0) return 0;
    if (axis == axis_count) return 1;
    const auto [count, stride] = axes[axis];
    const int64_t inner = at + extent[axis + 1] - low;
    const int64_t begin = inner > 0 ? 0 : -inner / stride + 1;
    const int64_t end = std::min(count, (behind - 1) / stride + 1);
    int64_t found = 0;
    for (int64_t n = begin; n < end && found < most; ++n)
      found += count_in(low, high, most - found, axis + 1, at + n * stride);
    return found;
  }

  // True if visit(address) is for any run.
  template <typename Visit>
  bool any(const Visit& visit, int axis, int64_t at) const {
    if (axis == axis_count) return visit(at);
    for (int64_t n = 0; n < axes[axis].count; ++n)
      if (any(visit, axis + 1, at + n * axes[axis].stride)) return true;
    return false;
  }

  int64_t runs() const {
    Size product = 1;
    for (int n = 0; n < axis_count; ++n) product = product * axes[n].count;
    return product.or_most();
  }

  // True if more than `most` runs of `other` have a byte of any run of this.
  bool meets_more_than(int64_t most, const Runs& other) const {
    return any(
        [&](int64_t at) { return other.count_in(at, at + run, most + 1, 0, other.first) > most; },
        0, first);
  }
};

}  // namespace

bool have_common_byte(const Array& a, const Array& b) {
  const Runs x(a, true), y(b, true);
  return x.runs() <= y.runs() ? x.meets_more_than(0, y) : y.meets_more_than(0, x);
}

bool overlaps_itself(const Array& array) {
  Axis axes[Array::kMostAxes];
  for (int n = 0; n < array.axis_count; ++n) {
    const int64_t stride = array.axes[n].stride;
    axes[n] = {array.axes[n].count, stride < 0 ? -stride : stride};
  }
  std::sort(axes, axes + array.axis_count,
            [](const Axis& a, const Axis& b) { return a.stride < b.stride; });
  bool nested = true;
  int64_t extent = array.run;
  for (int n = 0; n < array.axis_count; ++n) {
    if (axes[n].stride < array.run) return true;
    nested = nested && axes[n].stride >= extent;
    extent += (axes[n].count - 1) * axes[n].stride;
  }
  if (nested) return false;
  // Runs that interleave: each must meet itself alone.
  const Runs runs(array, false);
  return runs.meets_more_than(1, runs);
}

}  // namespace nabla_fast
