#include "call.h"
#include "fuzz.h"
#include "linear.h"
#include "tensor.h"

namespace fuzz {

FUZZ(nll_grad) {
  const int64_t rows = random.one_in(30) ? random.between(60, 130) : random.between(0, 9);
  const int64_t width = random.between(random.one_in(15) ? 0 : 1, 90);
  const int64_t vocab = random.one_in(30) ? random.between(8000, 18000) : random.size(400);
  Linear linear(random, rows, vocab, width, NABLA_FAST_FLOAT32);
  Tensor<float> grad(random, {rows}, width);
  List<int64_t> targets(random, rows);
  for (int64_t r = 0; r < rows; ++r) targets[r] = random.between(0, vocab - 1);
  targets.seal();
  List<nabla_fast_status> status(random, rows);
  Call<nabla_fast_nll_grad_args> call(random, nabla_fast_nll_grad, nabla_fast_nll_grad_workspace);
  call.rows(call.args.rows, rows);
  call.size(call.args.vocab, vocab, 1);
  linear.give(call);
  call.arrays.front().any_dtype = false;
  call.reads(By::kRows, call.args.targets, targets);
  call.writes(By::kRows, call.args.grad, grad);
  call.writes(By::kRows, call.args.row_status, status);
  if (rows > 0)
    call.mistake(NABLA_FAST_INVALID_TOKEN, [&] {
      targets[random.between(0, rows - 1)] =
          random.pick<int64_t>({-1, vocab, INT64_MAX, INT64_MIN});
    });
  if (random.one_in(3)) return call.check_refused();
  const State before = call.state();
  check(call.run() == NABLA_FAST_OK, "right arguments are refused");
  const State after = call.state();
  call.check_inputs();
  call.check_again(before, after);
  call.check_interleaved(before, after);
  call.check_rows_alone(before, after, 4);
  for (int64_t r = 0; r < rows; ++r) {
    check(is_row_status(status[r]), "a row's status");
    for (int64_t k = 0; k < width && status[r] != NABLA_FAST_OK; ++k)
      check(std::isnan(grad.row(r)[k]), "an answer to a bad row");
  }
}

}  // namespace fuzz
