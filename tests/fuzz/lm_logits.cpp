#include "call.h"
#include "fuzz.h"
#include "head_map.h"
#include "tensor.h"

namespace fuzz {

FUZZ(lm_logits) {
  const int64_t rows = random.one_in(4) ? random.between(0, 40) : random.between(0, 6);
  const int64_t width = random.between(random.one_in(15) ? 0 : 1, 150);
  const int64_t vocab = random.one_in(30) ? random.between(3000, 9000) : random.size(600);
  Tensor<float> hidden(random, {rows}, width), logits(random, {rows}, vocab);
  Matrix head(random, vocab, width, dtype(random));
  Values values(random);
  hidden.each_row([&](float* row) { values.fill_plain(row, width); });
  head.plain(values);
  HeadMap map(random, vocab);
  Call<nabla_fast_lm_logits_args> call(random, nabla_fast_lm_logits);
  call.rows(call.args.rows, rows);
  call.size(call.args.vocab, vocab, 0);
  call.reads(By::kRows, call.args.hidden, hidden).any_dtype = false;
  call.reads(By::kOthers, call.args.head, head);
  map.give(call);
  call.writes(By::kRows, call.args.logits, logits);
  if (random.one_in(3)) return call.check_refused();
  const State before = call.state();
  check(call.run() == NABLA_FAST_OK, "right arguments are refused");
  const State after = call.state();
  call.check_inputs();
  call.check_again(before, after);
  call.check_interleaved(before, after);
  call.check_rows_alone(before, after, 1);
  for (int n = 0; n < 20 && rows > 0; ++n) {
    const int64_t r = random.between(0, rows - 1), v = random.between(0, vocab - 1);
    double sum = 0, size = 0;
    head.with([&](auto& tensor) {
      for (int64_t k = 0; k < width; ++k) {
        const double term = double{hidden.row(r)[k]} * double{Values::wide(tensor.row(v)[k])};
        sum += term;
        size += std::fabs(term);
      }
    });
    const double z = map.z(v, sum), error = 1e-40 * static_cast<double>(width);
    // Products may be beyond fp32 at either end.
    if (!(map.size(v, size) < 1e37) || !(size < 1e37)) continue;
    check(logits.row(r)[v] == z ||
              std::fabs(logits.row(r)[v] - z) <= 1e-5 * map.size(v, size) + error,
          "a logit is far from what it is in double");
  }
}

}  // namespace fuzz
