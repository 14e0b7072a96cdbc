#include <numeric>

#include "call.h"
#include "fuzz.h"
#include "tensor.h"

namespace fuzz {
namespace {

// Noise of a token by the generator's definition.
double noise_of(const nabla_fast_draw_args& args, int64_t row, int64_t token) {
  const auto low = [](int64_t x) { return static_cast<uint32_t>(static_cast<uint64_t>(x)); };
  uint32_t c[4] = {low(token / 4), low(args.position[row]), low(args.start[row]),
                   4 * low(args.visit[row]) + (args.redraw ? 2 : 1)};
  uint32_t key[2] = {low(args.seed[row]), low(args.seed[row] >> 32)};
  for (int round = 0; round < 10; ++round) {
    const uint64_t first = uint64_t{0xD2511F53} * c[0], second = uint64_t{0xCD9E8D57} * c[2];
    const uint32_t next[4] = {
        static_cast<uint32_t>(second >> 32) ^ c[1] ^ key[0], static_cast<uint32_t>(second),
        static_cast<uint32_t>(first >> 32) ^ c[3] ^ key[1], static_cast<uint32_t>(first)};
    std::copy(next, next + 4, c);
    key[0] += 0x9E3779B9;
    key[1] += 0xBB67AE85;
  }
  return -std::log(-std::log((c[token % 4] + 0.5) / 4294967296.0));
}

// Tokens that are drawn from where a mass counts as `factor` of what it is.
std::vector<int64_t> kept_of(const std::vector<double>& scores, int64_t top_k, double top_p,
                             double factor) {
  const auto at = [&](int64_t v) { return scores[static_cast<size_t>(v)]; };
  const auto vocab = static_cast<int64_t>(scores.size());
  std::vector<int64_t> order(scores.size());
  std::iota(order.begin(), order.end(), 0);
  std::stable_sort(order.begin(), order.end(), [&](int64_t a, int64_t b) { return at(a) < at(b); });
  size_t first = 0;
  if (top_k > 0 && top_k < vocab) {
    const double least = at(order[static_cast<size_t>(vocab - top_k)]);
    while (at(order[first]) < least) ++first;
  }
  if (top_p < 1) {
    const double top = at(order.back());
    double total = 0, mass = 0;
    for (size_t n = first; n < order.size(); ++n) total += std::exp(at(order[n]) - top);
    const auto limit = static_cast<float>(1 - top_p);
    for (size_t n = first; n + 1 < order.size(); ++n) {
      mass += std::exp(at(order[n]) - top);
      if (static_cast<float>(factor * mass / total) > limit) break;
      first = n + 1;
    }
  }
  return {order.begin() + static_cast<std::ptrdiff_t>(first), order.end()};
}

}  // namespace

FUZZ(draw_tokens) {
  const int64_t rows = random.between(0, 6);
  const int64_t vocab = random.one_in(30) ? random.between(20000, 40000) : random.size(3000);
  Matrix logits(random, rows, vocab, dtype(random));
  Values values(random);
  logits.logits(values);
  List<int64_t> seed(random, rows), start(random, rows), visit(random, rows),
      position(random, rows), token(random, rows);
  List<nabla_fast_status> status(random, rows);
  for (auto* part : {&seed, &start, &visit, &position}) {
    for (int64_t r = 0; r < rows; ++r) (*part)[r] = static_cast<int64_t>(random.next());
    part->seal();
  }
  Call<nabla_fast_draw_args> call(random, nabla_fast_draw_tokens, nabla_fast_draw_tokens_workspace);
  call.rows(call.args.rows, rows);
  call.size(call.args.vocab, vocab, 1);
  call.tau(random.tau());
  call.args.redraw = static_cast<int32_t>(random.between(0, 1));
  call.args.top_k = random.pick<int64_t>({0, 0, 1, 7, vocab / 2, vocab - 1, vocab, INT64_MAX});
  call.args.top_p = random.pick({1.0, 1.0, 0.9, 0.5, 1e-9});
  call.mistake(NABLA_FAST_INVALID_FILTER, [&] { call.args.top_k = random.negative(); });
  call.mistake(NABLA_FAST_INVALID_FILTER, [&] {
    call.args.top_p = random.pick({0.0, -0.5, 1.001, double{kNaN}, double{kInfinity}});
  });
  call.reads(By::kRows, call.args.logits, logits);
  call.reads(By::kRows, call.args.seed, seed);
  call.reads(By::kRows, call.args.start, start);
  call.reads(By::kRows, call.args.visit, visit);
  call.reads(By::kRows, call.args.position, position);
  call.writes(By::kRows, call.args.token, token);
  call.writes(By::kRows, call.args.row_status, status);
  if (random.one_in(3)) return call.check_refused();
  const State before = call.state();
  check(call.run() == NABLA_FAST_OK, "right arguments are refused");
  const State after = call.state();
  call.check_inputs();
  call.check_again(before, after);
  call.check_interleaved(before, after);
  call.check_rows_alone(before, after, 1);

  const auto& args = call.args;
  for (int64_t r = 0; r < rows; ++r) {
    check(status[r] == logits.status(r), "a row's status is not that of its logits");
    if (status[r] != NABLA_FAST_OK) {
      check(token[r] == 0, "a row without an answer has a token");
      continue;
    }
    check(token[r] >= 0 && token[r] < vocab, "a token is not in the vocabulary");
    std::vector<double> scores(static_cast<size_t>(vocab));
    logits.with([&](auto& tensor) {
      for (int64_t v = 0; v < vocab; ++v)
        scores[static_cast<size_t>(v)] = double{Values::wide(tensor.row(r)[v])} / args.tau;
    });
    const auto with_noise = [&](int64_t v) {
      return scores[static_cast<size_t>(v)] + noise_of(args, r, v);
    };
    // Rounding may decide otherwise about a token whose mass is just what may be dropped.
    const auto possible = kept_of(scores, args.top_k, args.top_p, 1 + 1e-6);
    const auto certain = kept_of(scores, args.top_k, args.top_p, 1 - 1e-6);
    check(std::find(possible.begin(), possible.end(), token[r]) != possible.end(),
          "a token that is filtered out is drawn");
    const double best = with_noise(token[r]);
    const double near = 1e-9 + 1e-12 * std::fabs(best);
    for (const int64_t v : certain)
      check(with_noise(v) <= best + near, "another token has more with its noise");
  }
}

}  // namespace fuzz
