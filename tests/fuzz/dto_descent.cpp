#include "descent.h"

namespace fuzz {
namespace {

struct Call : DescentCall {
  int64_t bytes() const {
    return nabla_fast_dto_descent_workspace(rows, vocab, iters, noise_seed != nullptr,
                                            group != nullptr, threads);
  }
  nabla_fast_status operator()(void* workspace, int64_t size) const {
    return nabla_fast_dto_descent(
        parameter, grad, exp_avg, exp_avg_sq, step, rows, vocab, parameter_stride, grad_stride,
        exp_avg_stride, exp_avg_sq_stride, schedule, iters, schedule_stride, until, group, tau,
        noise_seed, noise_position, token, flipped, row_status, workspace, size, threads);
  }
};

}  // namespace

FUZZ(dto_descent) {
  const int64_t rows = random.between(0, 5), iters = random.between(0, 12);
  const int64_t vocab = random.one_in(40) ? random.between(60000, 80000) : random.size(4000);
  DescentProblem problem(random, rows, vocab, vocab, iters);
  Values values(random);
  const bool strange = random.one_in(4);
  problem.parameter.each_row([&](float* row) {
    if (strange)
      values.fill_logits(row, vocab);
    else
      values.fill_plain(row, vocab);
    // A token to leave.
    row[random.between(0, vocab - 1)] += static_cast<float>(random.between(0, 3));
  });
  problem.fill(random, strange);
  Call call{problem.call(random)};

  if (random.one_in(3)) {
    const int64_t what = random.between(0, kSpoiled);
    if (what < kSpoiled) {
      spoil(random, call, what);
      spoil_strides(random, call);
    }
    if (rows > 0 && random.one_in(8))
      problem.step[random.between(0, rows - 1)] = random.pick<int64_t>({-1, INT64_MIN});
    check_refused(random, problem, call, what == kSpoiled);
    return;
  }

  const DescentState before = problem.state();
  bool good = true;
  for (int64_t r = 0; r < rows; ++r)
    good = good && status_of(problem.parameter.row(r), vocab) == NABLA_FAST_OK;
  const nabla_fast_status status = run(random, call, 0xFF);
  check(problem.grad.untouched() && problem.schedule.untouched(), "inputs have changed");
  const DescentState after = problem.state();
  check(status == (good ? NABLA_FAST_OK : NABLA_FAST_BAD_ROWS), "right arguments are refused");
  if (!good) {
    check(after == before, "rows without an answer have changed");
    for (int64_t r = 0; r < rows; ++r)
      check(problem.row_status[r] == status_of(problem.parameter.row(r), vocab), "a row's status");
    return;
  }
  check_again(random, problem, call, before, after);
  problem.check_steps(before, after, call);
  for (int64_t r = 0; r < rows; ++r) {
    const float* row = problem.parameter.row(r);
    bool clean = true;
    for (int64_t v = 0; v < vocab; ++v) clean = clean && row[v] < kInfinity;
    if (clean && !call.noise_seed)
      check(problem.token[r] == argmax(row, vocab), "the hard token is not the argmax");
    const float* start = before.parameter.data() + r * vocab;
    for (int64_t v = 0; v < vocab && clean; ++v)
      check(start[v] != -kInfinity || row[v] == -kInfinity, "a masked token came back");
  }
  check_rows_alone(random, problem, call, before, after, 3);
}

}  // namespace fuzz
