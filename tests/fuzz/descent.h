// What the descents on logits and on hidden states are given, and what they may change.
#ifndef NABLA_FAST_FUZZ_DESCENT_H_
#define NABLA_FAST_FUZZ_DESCENT_H_

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <vector>

#include "call.h"
#include "fuzz.h"
#include "tensor.h"

namespace fuzz {

using DescentCall = Call<nabla_fast_descent_args>;

// Rows [rows, width] of a parameter with their G [rows, vocab] and the state of their descent.
struct DescentProblem {
  int64_t rows, vocab, width, iters;
  bool one_schedule;
  Tensor<float> parameter, grad, exp_avg, exp_avg_sq;
  Tensor<double> schedule;
  List<int64_t> step, until, group, seed, position, token;
  List<uint8_t> flipped;
  List<nabla_fast_status> row_status;

  DescentProblem(Random& random, int64_t n, int64_t v, int64_t w, int64_t k)
      : rows(n),
        vocab(v),
        width(w),
        iters(k),
        one_schedule(random.one_in(4)),
        parameter(random, {n}, w),
        grad(random, {n}, v),
        exp_avg(random, {n}, w),
        exp_avg_sq(random, {n}, w),
        schedule(random, {one_schedule ? std::min<int64_t>(n, 1) : n}, k),
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
    for (AnyTensor* list : {&until, &group, &seed, &position}) list->seal();
  }
  std::vector<int64_t> steps() { return {step.data(), step.data() + rows}; }
  static float strange_value(Random& random) {
    return random.pick({kNaN, kInfinity, -kInfinity, 1e38f});
  }

  // With some of what may be left out.
  void give(Random& random, DescentCall& call) {
    nabla_fast_descent_args& args = call.args;
    call.rows(args.rows, rows);
    call.size(args.vocab, vocab, 1);
    call.size(args.iters, iters, 0);
    call.tau(random.tau());
    call.writes(By::kRows, args.parameter, parameter);
    call.writes(By::kRows, args.exp_avg, exp_avg);
    call.writes(By::kRows, args.exp_avg_sq, exp_avg_sq);
    call.writes(By::kRows, args.step, step);
    call.reads(By::kRows, args.grad, grad).any_dtype = false;
    call.reads(one_schedule ? By::kOthers : By::kRows, args.schedule, schedule,
               {&args.schedule_stride})
        .stays = one_schedule;
    if (one_schedule && rows > 1) args.schedule_stride = 0;
    if (random.one_in(2)) call.reads(By::kRows, args.until, until).may_be_null = true;
    if (random.one_in(2)) call.reads(By::kRows, args.group, group).may_be_null = true;
    if (random.one_in(3)) {
      // Neither may be null where the other is not.
      call.reads(By::kRows, args.noise_seed, seed);
      call.reads(By::kRows, args.noise_position, position);
    } else {
      call.mistake(NABLA_FAST_INVALID_POINTER, [&] {
        (random.one_in(2) ? args.noise_seed : args.noise_position) = seed.data();
        if (args.noise_seed == args.noise_position) args.noise_seed = nullptr;
      });
    }
    call.writes(By::kRows, args.token, token);
    call.writes(By::kRows, args.flipped, flipped);
    call.writes(By::kRows, args.row_status, row_status);
    if (rows == 0) return;
    call.mistake(NABLA_FAST_INVALID_STEPS, [&] {
      step[random.between(0, rows - 1)] = random.pick<int64_t>({-1, INT64_MIN});
    });
    if (args.until)
      call.mistake(NABLA_FAST_INVALID_STEPS, [&] {
        until[random.between(0, rows - 1)] = random.pick<int64_t>({iters + 1, INT64_MAX});
      });
  }

  // That rows without an answer have not changed.
  void check_unchanged(DescentCall& call, const State& before, const State& after) {
    check(call.same_state(before, after, &row_status), "rows without an answer have changed");
  }
  // What holds for rows that have all descended, from `start` steps.
  void check_descended(DescentCall& call, const std::vector<int64_t>& start, const State& before,
                       const State& after, int64_t apart) {
    call.check_again(before, after);
    call.check_interleaved(before, after);
    for (int64_t r = 0; r < rows; ++r) {
      const int64_t first = start[static_cast<size_t>(r)];
      const int64_t last = call.args.until ? until[r] : iters;
      check(row_status[r] == NABLA_FAST_OK, "a row's status");
      check(step[r] >= first && step[r] <= std::max(last, first), "the steps of a row");
      check(flipped[r] <= (step[r] > first), "a token moved without a step");
    }
    if (!call.args.group) call.check_rows_alone(before, after, apart);
  }
};

}  // namespace fuzz

#endif  // NABLA_FAST_FUZZ_DESCENT_H_
