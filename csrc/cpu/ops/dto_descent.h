// A call, Adam's step and rows that stop together: for the descents on logits and on latents.
#ifndef NABLA_FAST_CPU_OPS_DTO_DESCENT_H_
#define NABLA_FAST_CPU_OPS_DTO_DESCENT_H_

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>

#include "base/check.h"
#include "base/isa.h"
#include "nabla_fast.h"
#include "ops/dto_descent_call.h"
#include "simd/vec.h"

namespace nabla_fast::descent {

constexpr double kBeta1 = 0.9, kBeta2 = 0.999;
constexpr float kEpsilon = 1e-8f;

struct AdamRate {
  float rate;   // learning rate / (1 - beta1^step)
  float scale;  // 1 / sqrt(1 - beta2^step)
};

// Parameters `x` after a step along gradients `g`. The moments are updated.
template <int W>
NABLA_FAST_INLINE Floats<W> adam(Floats<W> x, Floats<W> g, AdamRate step, Floats<W>& exp_avg,
                                 Floats<W>& exp_avg_sq) {
  const float share1 = static_cast<float>(1 - kBeta1);
  const float beta2 = static_cast<float>(kBeta2), share2 = static_cast<float>(1 - kBeta2);
  exp_avg = exp_avg + share1 * (g - exp_avg);
  exp_avg_sq = beta2 * exp_avg_sq + share2 * g * g;
  return x - step.rate * (exp_avg / (vec_sqrt<W>(exp_avg_sq) * step.scale + kEpsilon));
}

// Arguments of a call.
struct Call : nabla_fast_descent_args {
  float* parameter_of(int64_t row) const { return at(parameter, row); }
  float* exp_avg_of(int64_t row) const { return at(exp_avg, row); }
  float* exp_avg_sq_of(int64_t row) const { return at(exp_avg_sq, row); }
  const float* grad_of(int64_t row) const {
    return static_cast<const float*>(grad.data) + row * grad.stride;
  }

  // Number of steps that a row may take.
  int64_t steps_left(int64_t row) const {
    const int64_t last = until ? until[row] : iters;
    return last > step[row] ? last - step[row] : 0;
  }
  // Rate of the step that follows `more` steps of this call.
  AdamRate rate(int64_t row, int64_t more) const {
    const int64_t before = step[row] + more;
    const double count = static_cast<double>(before + 1);
    const double lr = schedule[row * schedule_stride + before];
    return {static_cast<float>(lr / (1 - std::pow(kBeta1, count))),
            static_cast<float>(1 / std::sqrt(1 - std::pow(kBeta2, count)))};
  }

 private:
  float* at(const nabla_fast_output& matrix, int64_t row) const {
    return static_cast<float*>(matrix.data) + row * stride_of(matrix, rows);
  }
};

// OK, or why the steps that a call's memory holds are refused.
inline nabla_fast_status check_steps(const nabla_fast_descent_args& call) {
  for (int64_t row = 0; row < call.rows; ++row)
    if (call.step[row] < 0 || (call.until && call.until[row] > call.iters))
      return NABLA_FAST_INVALID_STEPS;
  return NABLA_FAST_OK;
}

// Groups of rows that stop together. A row's leader is the first row of its group.
struct StopGroups {
  int64_t* order;     // [rows]
  int64_t* leader;    // [rows]; -1: the row has a group to itself
  int64_t* earliest;  // [rows], of a leader: after how many steps its group's first token moves

  void sort(const int64_t* group, int64_t rows) {
    for (int64_t row = 0; row < rows; ++row) order[row] = row;
    std::sort(order, order + rows, [&](int64_t a, int64_t b) {
      return group[a] != group[b] ? group[a] < group[b] : a < b;
    });
    for (int64_t n = 0; n < rows; ++n) {
      const int64_t row = order[n];
      const bool first = n == 0 || group[order[n - 1]] != group[row];
      leader[row] = first ? row : leader[order[n - 1]];
      earliest[row] = std::numeric_limits<int64_t>::max();
    }
    for (int64_t n = 0; n < rows; ++n) {
      const bool before = n > 0 && leader[order[n - 1]] == leader[order[n]];
      const bool after = n + 1 < rows && leader[order[n + 1]] == leader[order[n]];
      if (!before && !after) leader[order[n]] = -1;
    }
  }
};

}  // namespace nabla_fast::descent

#endif  // NABLA_FAST_CPU_OPS_DTO_DESCENT_H_
