// Numbers that several files compare with.
#ifndef NABLA_FAST_CPU_BASE_FLOATS_H_
#define NABLA_FAST_CPU_BASE_FLOATS_H_

#include <limits>

namespace nabla_fast {

constexpr float kInfinity = std::numeric_limits<float>::infinity();
constexpr float kNaN = std::numeric_limits<float>::quiet_NaN();
constexpr float kMaxFloat = std::numeric_limits<float>::max();

// exp(x) counts as 0 for lower x: exp(-87) is just above 2^-126, the smallest normal number.
constexpr float kMinExponent = -87.0f;

}  // namespace nabla_fast

#endif  // NABLA_FAST_CPU_BASE_FLOATS_H_
