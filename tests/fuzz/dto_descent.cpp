#include "descent.h"

namespace fuzz {

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
  DescentCall call(random, nabla_fast_dto_descent, nabla_fast_dto_descent_workspace);
  call.garbage(call.args.head);
  problem.give(random, call);
  if (random.one_in(3)) return call.check_refused();

  const State before = call.state();
  const std::vector<int64_t> start = problem.steps();
  const std::vector<char> given = problem.parameter.view().elements();
  std::vector<nabla_fast_status> statuses;
  for (int64_t r = 0; r < rows; ++r) statuses.push_back(status_of(problem.parameter.row(r), vocab));
  const bool good = std::all_of(statuses.begin(), statuses.end(),
                                [](nabla_fast_status s) { return s == NABLA_FAST_OK; });
  check(call.run() == (good ? NABLA_FAST_OK : NABLA_FAST_BAD_ROWS), "right arguments are refused");
  call.check_inputs();
  const State after = call.state();
  for (int64_t r = 0; r < rows; ++r)
    check(problem.row_status[r] == statuses[static_cast<size_t>(r)], "a row's status");
  if (!good) return problem.check_unchanged(call, before, after);
  problem.check_descended(call, start, before, after, 3);
  for (int64_t r = 0; r < rows; ++r) {
    const float *row = problem.parameter.row(r), *first = Tensor<float>::of(given) + r * vocab;
    bool clean = true;
    for (int64_t v = 0; v < vocab; ++v) clean = clean && row[v] < kInfinity;
    if (clean && !call.args.noise_seed)
      check(problem.token[r] == argmax(row, vocab), "the hard token is not the argmax");
    for (int64_t v = 0; v < vocab && clean; ++v)
      check(first[v] != -kInfinity || row[v] == -kInfinity, "a masked token came back");
  }
}

}  // namespace fuzz
