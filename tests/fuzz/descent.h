// What the descents on logits and on hidden states are given, and what they may change.
#ifndef NABLA_FAST_FUZZ_DESCENT_H_
#define NABLA_FAST_FUZZ_DESCENT_H_

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <type_traits>
#include <vector>

#include "fuzz.h"

namespace fuzz {

// Arguments that both functions take.
struct DescentCall {
  float* parameter;
  const float* grad;
  float *exp_avg, *exp_avg_sq;
  int64_t* step;
  int64_t rows, vocab, parameter_stride, grad_stride, exp_avg_stride, exp_avg_sq_stride;
  const double* schedule;
  int64_t iters, schedule_stride;
  const int64_t *until, *group;
  double tau;
  const int64_t *noise_seed, *noise_position;
  int64_t* token;
  uint8_t* flipped;
  nabla_fast_status* row_status;
  int32_t threads;
};

// Ways to spoil() a call; those before kSpoiledOthers need a parameter with columns.
constexpr int64_t kSpoiledOthers = 3, kSpoiled = 16;

// One thing wrong with what both functions take.
inline void spoil(Random& random, DescentCall& call, int64_t what) {
  switch (what) {
    case 0:
      call.parameter = nullptr;
      break;
    case 1:
      call.exp_avg = nullptr;
      break;
    case 2:
      call.exp_avg_sq = nullptr;
      break;
    case 3:
      call.grad = nullptr;
      break;
    case 4:
      call.step = nullptr;
      break;
    case 5:
      call.token = nullptr;
      break;
    case 6:
      call.flipped = nullptr;
      break;
    case 7:
      call.row_status = nullptr;
      break;
    case 8:
      call.rows = random.negative();
      break;
    case 9:
      call.vocab = random.pick<int64_t>({0, random.negative()});
      break;
    case 10:
      call.iters = random.negative();
      break;
    case 11:
      call.rows = random.huge();
      break;
    case 12:
      call.vocab = random.huge();
      break;
    case 13:
      call.iters = random.huge();
      break;
    case 14:
      call.tau = random.wrong_tau();
      break;
    default:
      // A seed without a position.
      call.noise_position = nullptr;
      call.noise_seed = call.step;
      break;
  }
}

// Strides with which nothing has a place, beside what else is wrong.
inline void spoil_strides(Random& random, DescentCall& call) {
  if (call.rows > 1 && random.one_in(8)) call.parameter_stride = random.huge();
  if (call.rows > 1 && random.one_in(8)) call.exp_avg_sq_stride = INT64_MIN;
}

// What a call changes: each of it once.
struct DescentState {
  std::vector<float> parameter, exp_avg, exp_avg_sq;
  std::vector<int64_t> step, token;
  std::vector<uint8_t> flipped;

  bool operator==(const DescentState& other) const {
    return same(parameter, other.parameter) && same(exp_avg, other.exp_avg) &&
           same(exp_avg_sq, other.exp_avg_sq) && step == other.step && token == other.token &&
           flipped == other.flipped;
  }
};

// Rows [rows, width] of a parameter with their G [rows, vocab] and the state of their descent.
struct DescentProblem {
  int64_t rows, vocab, width, iters;
  Tensor<float> parameter, grad, exp_avg, exp_avg_sq;
  Tensor<double> schedule;
  Memory<int64_t> step, until, group, seed, position, token;
  Memory<uint8_t> flipped;
  Memory<nabla_fast_status> row_status;

  DescentProblem(Random& random, int64_t n, int64_t v, int64_t w, int64_t k)
      : rows(n),
        vocab(v),
        width(w),
        iters(k),
        parameter(random, {n}, w),
        grad(random, {n}, v),
        exp_avg(random, {n}, w),
        exp_avg_sq(random, {n}, w),
        schedule(random, {n}, k),
        step(random, n),
        until(random, n),
        group(random, n),
        seed(random, n),
        position(random, n),
        token(random, n),
        flipped(random, n),
        row_status(random, n) {}

  // All but the parameter; numbers that are none here and there if it is `strange`.
  void fill(Random& random, bool strange) {
    Values gradients(random);
    grad.each_row([&](float* row) {
      gradients.fill_plain(row, vocab);
      if (strange && random.one_in(3)) row[random.between(0, vocab - 1)] = strange_value(random);
    });
    const bool fresh = random.one_in(2);
    exp_avg.each_row([&](float* row) {
      for (int64_t k = 0; k < width; ++k) row[k] = fresh ? 0 : 0.01f * gradients.plain();
    });
    exp_avg_sq.each_row([&](float* row) {
      for (int64_t k = 0; k < width; ++k) row[k] = fresh ? 0 : 1e-4f * std::fabs(gradients.plain());
    });
    schedule.each_row([&](double* row) {
      for (int64_t k = 0; k < iters; ++k) row[k] = random.pick({0.01, 0.1, 0.5, 0.0});
      if (strange && iters > 0 && random.one_in(6))
        row[random.between(0, iters - 1)] = random.pick({HUGE_VAL, double{kNaN}, 1e300, -1.0});
    });
    for (int64_t r = 0; r < rows; ++r) {
      step[r] = fresh ? 0 : random.between(0, iters);
      until[r] = random.one_in(20) ? INT64_MIN : random.between(0, iters);
      group[r] = random.pick<int64_t>({0, 0, 1, -5, INT64_MAX, INT64_MIN});
      seed[r] = static_cast<int64_t>(random.next());
      position[r] = random.pick<int64_t>({0, 1, 12345, INT64_MAX});
    }
  }
  static float strange_value(Random& random) {
    return random.pick({kNaN, kInfinity, -kInfinity, 1e38f});
  }

  DescentState state() {
    const auto list = [](const auto& memory) {
      return std::vector<std::decay_t<decltype(memory[0])>>(memory.data(),
                                                            memory.data() + memory.count());
    };
    return {parameter.elements(), exp_avg.elements(), exp_avg_sq.elements(),
            list(step),           list(token),        list(flipped)};
  }
  void put(const DescentState& state) {
    parameter.put(state.parameter);
    exp_avg.put(state.exp_avg);
    exp_avg_sq.put(state.exp_avg_sq);
    std::copy(state.step.begin(), state.step.end(), step.data());
  }

  // With some of what may be left out.
  DescentCall call(Random& random) {
    DescentCall call{parameter.data(),
                     grad.data(),
                     exp_avg.data(),
                     exp_avg_sq.data(),
                     step.data(),
                     rows,
                     vocab,
                     parameter.stride(0),
                     grad.stride(0),
                     exp_avg.stride(0),
                     exp_avg_sq.stride(0),
                     schedule.data(),
                     iters,
                     schedule.stride(0),
                     nullptr,
                     nullptr,
                     random.tau(),
                     nullptr,
                     nullptr,
                     token.data(),
                     flipped.data(),
                     row_status.data(),
                     random.threads()};
    if (random.one_in(2)) call.until = until.data();
    if (random.one_in(2)) call.group = group.data();
    if (random.one_in(3)) {
      call.noise_seed = seed.data();
      call.noise_position = position.data();
    }
    return call;
  }
  // Row r of a call alone.
  void take_row(DescentCall& call, int64_t r) {
    if (call.parameter) {
      call.parameter = parameter.row(r);
      call.exp_avg = exp_avg.row(r);
      call.exp_avg_sq = exp_avg_sq.row(r);
    }
    call.grad = grad.row(r);
    call.step += r;
    call.rows = 1;
    if (call.schedule_stride != 0) call.schedule = schedule.row(r);
    if (call.until) call.until += r;
    if (call.noise_seed) {
      call.noise_seed += r;
      call.noise_position += r;
    }
    call.token += r;
    call.flipped += r;
    call.row_status += r;
  }
  // Whether row r is now as it was `after` a call of all rows.
  bool row_is(int64_t r, const DescentState& after) {
    const auto index = static_cast<size_t>(r);
    return same(parameter.row(r), after.parameter.data() + r * width, width) &&
           same(exp_avg.row(r), after.exp_avg.data() + r * width, width) &&
           same(exp_avg_sq.row(r), after.exp_avg_sq.data() + r * width, width) &&
           step[r] == after.step[index] && token[r] == after.token[index] &&
           flipped[r] == after.flipped[index];
  }
  // That no row took steps it had not, or more than it has.
  void check_steps(const DescentState& before, const DescentState& after, const DescentCall& call) {
    for (int64_t r = 0; r < rows; ++r) {
      const auto index = static_cast<size_t>(r);
      const int64_t last = call.until ? until[r] : iters;
      check(row_status[r] == NABLA_FAST_OK, "a row's status");
      check(after.step[index] >= before.step[index] &&
                after.step[index] <= std::max(last, before.step[index]),
            "the steps of a row");
      check(after.flipped[index] <= (after.step[index] > before.step[index]),
            "a token moved without a step");
    }
  }
};

// A call whose arguments are wrong is refused and writes nothing. small: nor is the workspace large
// enough.
template <typename Call>
void check_refused(Random& random, DescentProblem& problem, const Call& call, bool small) {
  const DescentState given = problem.state();
  const int64_t bytes = call.bytes();
  check(bytes >= 0, "a size is negative");
  const int64_t size = small && bytes > 0 ? bytes - 1 : std::min<int64_t>(bytes, 1 << 20);
  Workspace workspace(random, size, 0xAA);
  const nabla_fast_status status = call(workspace.data(), size);
  check(refuses(status) || (problem.rows == 0 && status == NABLA_FAST_OK),
        "wrong arguments are accepted");
  check(problem.state() == given && problem.grad.untouched(), "a refused call has written");
}

// The call in a workspace of just its size, filled with `fill`.
template <typename Call>
nabla_fast_status run(Random& random, const Call& call, int fill) {
  Workspace workspace(random, call.bytes(), fill);
  return call(workspace.data(), call.bytes());
}

// The same on other threads and in another workspace leaves the same state.
template <typename Call>
void check_again(Random& random, DescentProblem& problem, Call call, const DescentState& before,
                 const DescentState& after) {
  problem.put(before);
  call.threads = random.threads();
  check(run(random, call, 0) == NABLA_FAST_OK && problem.state() == after,
        "the result depends on the threads or on what the workspace holds");
}

// Rows alone are as they are among others; at most `apart` rows are left out between two.
template <typename Call>
void check_rows_alone(Random& random, DescentProblem& problem, const Call& call,
                      const DescentState& before, const DescentState& after, int64_t apart) {
  if (call.group) return;
  for (int64_t r = 0; r < problem.rows; r += random.between(1, apart)) {
    problem.put(before);
    Call alone = call;
    problem.take_row(alone, r);
    check(run(random, alone, 0x55) == NABLA_FAST_OK, "a row alone is refused");
    check(problem.row_is(r, after), "a row's result depends on the others");
  }
}

}  // namespace fuzz

#endif  // NABLA_FAST_FUZZ_DESCENT_H_
