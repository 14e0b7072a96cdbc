#include "call.h"
#include "fuzz.h"
#include "linear.h"
#include "tensor.h"

namespace fuzz {
namespace {

struct Statistics {
  List<float> logsumexp, confidence, entropy;
  List<int64_t> argmax;
  List<nabla_fast_status> status;

  Statistics(Random& random, int64_t rows)
      : logsumexp(random, rows),
        confidence(random, rows),
        entropy(random, rows),
        argmax(random, rows),
        status(random, rows) {}
  void give(Call<nabla_fast_stats_args>& call) {
    call.writes(By::kRows, call.args.logsumexp, logsumexp);
    call.writes(By::kRows, call.args.confidence, confidence);
    call.writes(By::kRows, call.args.entropy, entropy);
    call.writes(By::kRows, call.args.argmax, argmax);
    call.writes(By::kRows, call.args.row_status, status);
  }
  // Whether there is a result of a row; if not, all of it says so.
  bool has(int64_t r) {
    if (status[r] == NABLA_FAST_OK) return true;
    check(std::isnan(logsumexp[r]) && std::isnan(confidence[r]) && std::isnan(entropy[r]) &&
              argmax[r] == -1,
          "a row without an answer has one");
    return false;
  }
};

// A right call, or nothing where a wrong one was checked.
bool run(Random& random, Call<nabla_fast_stats_args>& call, int64_t apart) {
  if (random.one_in(3)) {
    call.check_refused();
    return false;
  }
  const State before = call.state();
  check(call.run() == NABLA_FAST_OK, "right arguments are refused");
  const State after = call.state();
  call.check_inputs();
  call.check_again(before, after);
  call.check_interleaved(before, after);
  call.check_rows_alone(before, after, apart);
  return true;
}

}  // namespace

FUZZ(token_stats) {
  const int64_t rows = random.between(0, 6);
  const int64_t vocab = random.one_in(30) ? random.between(60000, 140000) : random.size(20000);
  Matrix logits(random, rows, vocab, dtype(random));
  Values values(random);
  logits.logits(values);
  Statistics found(random, rows);
  Call<nabla_fast_stats_args> call(random, nabla_fast_token_stats);
  call.garbage(call.args.hidden);
  call.garbage(call.args.head);
  if (random.one_in(2)) call.garbage(call.args.head_map);
  call.rows(call.args.rows, rows);
  call.size(call.args.vocab, vocab, 1);
  call.tau(random.tau());
  call.reads(By::kRows, call.args.logits, logits);
  found.give(call);
  if (!run(random, call, 1)) return;

  const double tau = call.args.tau;
  for (int64_t r = 0; r < rows; ++r) {
    check(found.status[r] == logits.status(r), "a row's status is not that of its logits");
    if (!found.has(r)) continue;
    check(found.argmax[r] == logits.best(r), "argmax");
    logits.with([&](auto& tensor) {
      const auto* row = tensor.row(r);
      const double top = Values::wide(row[found.argmax[r]]);
      double sum = 0, weighted = 0;
      for (int64_t v = 0; v < vocab; ++v) {
        const double x = (Values::wide(row[v]) - top) / tau;
        if (x < -700) continue;
        sum += std::exp(x);
        weighted += x * std::exp(x);
      }
      const double logsumexp = top / tau + std::log(sum), entropy = std::log(sum) - weighted / sum;
      const auto near = [](double a, double b, double scale) {
        return std::fabs(a - b) <= 1e-5 * (std::fabs(b) + scale);
      };
      if (std::fabs(logsumexp) < 1e38)
        check(near(found.logsumexp[r], logsumexp, 1), "logsumexp is far from what it is in double");
      check(near(found.confidence[r], 1 / sum, 1e-30),
            "confidence is far from what it is in double");
      check(near(found.entropy[r], entropy, 1), "entropy is far from what it is in double");
    });
  }
}

FUZZ(linear_token_stats) {
  const Sizes sizes(random);
  const int64_t rows = sizes.rows, vocab = sizes.vocab;
  Linear linear(random, rows, vocab);
  Statistics found(random, rows);
  Call<nabla_fast_stats_args> call(random, nabla_fast_linear_token_stats,
                                   nabla_fast_linear_token_stats_workspace);
  call.garbage(call.args.logits);
  call.rows(call.args.rows, rows);
  call.size(call.args.vocab, vocab, 1);
  call.tau(random.tau());
  linear.give(call);
  found.give(call);
  if (!run(random, call, 1 + rows / 4)) return;

  const double tau = call.args.tau;
  for (int64_t r = 0; r < rows; r += random.between(1, 1 + rows / 4)) {
    check(is_row_status(found.status[r]), "a row's status");
    const Row row(linear, r, tau);
    if (row.moderate())
      check(found.status[r] == row.status(), "a row's status is not that of its logits");
    if (!found.has(r)) continue;
    check(found.argmax[r] >= 0 && found.argmax[r] < vocab, "argmax is no token");
    check(found.confidence[r] > 0 && found.confidence[r] <= 1, "confidence");
    check(found.entropy[r] > -1e-5 &&
              found.entropy[r] < std::log(static_cast<double>(vocab)) * 1.00001 + 1e-5,
          "entropy");
    if (!row.moderate()) continue;
    check(row.z[static_cast<size_t>(found.argmax[r])] >= row.top - kNear * row.size - kTiny,
          "argmax");
    const double scale = row.size / tau + 1 + std::fabs(row.logsumexp);
    if (scale < 1e30)
      check(std::fabs(found.logsumexp[r] - row.logsumexp) <= kNear * scale,
            "logsumexp is far from what it is in double");
  }
}

}  // namespace fuzz
