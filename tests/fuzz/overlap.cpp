// The test for overlaps against all bytes of all elements, one by one.
#include "base/overlap.h"

#include <algorithm>
#include <vector>

#include "fuzz.h"

namespace fuzz {
namespace {

// Elements, each so many bytes from its address on.
struct Elements {
  std::vector<int64_t> addresses;
  int64_t bytes;

  // Addresses of all their bytes, in order.
  std::vector<int64_t> all_bytes() const {
    std::vector<int64_t> all;
    for (const int64_t address : addresses)
      for (int64_t n = 0; n < bytes; ++n) all.push_back(address + n);
    std::sort(all.begin(), all.end());
    return all;
  }
};

struct Drawn {
  nabla_fast::Array array;
  std::vector<int64_t> bytes;
  bool itself;  // whether a byte is two elements'
};

// A tensor of few elements, in few bytes or far apart.
Drawn draw(Random& random) {
  const bool far = random.one_in(8);
  const auto count = [&] { return random.pick<int64_t>({0, 1, 1, 2, 2, 3, 3, 4, 5}); };
  const auto stride = [&]() -> int64_t {
    if (far && random.one_in(2)) return random.pick<int64_t>({1, -1, 3}) * (int64_t{1} << 40);
    return random.one_in(3) ? random.between(-3, 3) : random.between(-40, 40);
  };
  nabla_fast::Axis axes[3];
  for (nabla_fast::Axis& axis : axes) {
    axis.count = random.one_in(3) ? 1 : std::max<int64_t>(count(), random.one_in(8) ? 0 : 1);
    axis.stride = axis.count > 1 ? stride() : random.huge();
  }
  const int64_t columns = random.one_in(12) ? 0 : random.between(1, 4);
  Elements elements{{}, random.pick<int64_t>({1, 2, 4, 8})};
  // Tests of addresses alone: nothing is there.
  const int64_t first = (random.one_in(4) ? int64_t{1} << 46 : 4096) + 8 * random.between(0, 40);
  const int64_t a = axes[0].count, b = axes[1].count, c = axes[2].count;
  for (int64_t n = 0; n < a * b * c * columns; ++n) {
    const int64_t column = n % columns, k = n / columns % c, j = n / columns / c % b;
    const int64_t i = n / columns / c / b;
    int64_t at = column;
    if (i > 0) at += i * axes[0].stride;
    if (j > 0) at += j * axes[1].stride;
    if (k > 0) at += k * axes[2].stride;
    elements.addresses.push_back(first + at * elements.bytes);
  }
  const auto* data = reinterpret_cast<const char*>(static_cast<uintptr_t>(first));
  const std::vector<int64_t> bytes = elements.all_bytes();
  return {{data, {axes[0], axes[1], axes[2]}, columns, elements.bytes},
          bytes,
          std::adjacent_find(bytes.begin(), bytes.end()) != bytes.end()};
}

bool meet(const Drawn& a, const Drawn& b) {
  std::vector<int64_t> both;
  std::set_intersection(a.bytes.begin(), a.bytes.end(), b.bytes.begin(), b.bytes.end(),
                        std::back_inserter(both));
  return !both.empty();
}

}  // namespace

FUZZ(overlap) {
  const Drawn a = draw(random), b = draw(random);
  check(a.array.empty() == a.bytes.empty(), "whether an array is empty");
  if (a.array.empty() || b.array.empty()) return;
  check(nabla_fast::have_common_byte(a.array, b.array) == meet(a, b), "a common byte");
  check(nabla_fast::have_common_byte(b.array, a.array) == meet(a, b), "a common byte");
  check(nabla_fast::overlaps_itself(a.array) == a.itself, "an array that overlaps itself");
}

FUZZ(overlap_of_many) {
  std::vector<Drawn> written, read;
  const bool many = random.one_in(3);
  for (int64_t n = random.between(0, many ? 40 : 3); n > 0; --n) {
    Drawn array = draw(random);
    // Else hardly any call with many is without an overlap.
    const auto meets = [&](const Drawn& other) { return meet(array, other); };
    if (many && !random.one_in(60) &&
        (array.itself || std::any_of(written.begin(), written.end(), meets)))
      continue;
    written.push_back(array);
  }
  for (int64_t n = random.between(0, 3); n > 0; --n) read.push_back(draw(random));
  bool expected = false;
  for (size_t n = 0; n < written.size(); ++n) {
    expected |= written[n].itself;
    for (size_t m = 0; m < n; ++m) expected |= meet(written[n], written[m]);
    for (const Drawn& array : read) expected |= meet(written[n], array);
  }
  const bool found = nabla_fast::any_overlap([&](auto& arrays) {
    for (const Drawn& array : written) arrays.writes(array.array);
    for (const Drawn& array : read) arrays.reads(array.array);
  });
  check(found == expected, "an overlap of some arrays");
}

}  // namespace fuzz
