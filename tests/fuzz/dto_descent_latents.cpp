#include "descent.h"
#include "head_map.h"

namespace fuzz {
namespace {

// In double.
struct Logit {
  double value = 0, size = 0;  // the sum of its terms, and of their absolute values
  double error = 0;            // by how much a kernel's may differ
};

struct Problem : DescentProblem {
  Matrix head;
  HeadMap map;

  Problem(Random& random, int64_t n, int64_t v, int64_t w, int64_t k)
      : DescentProblem(random, n, v, w, k),
        head(random, v, w, fuzz::dtype(random)),
        map(random, v) {}

  // A logit of a row of hidden states.
  Logit logit(const float* hidden, int64_t v) {
    Logit z;
    head.with([&](auto& tensor) {
      const auto* const token_row = tensor.row(v);
      for (int64_t k = 0; k < width; ++k) {
        const double x = hidden[k], w = Values::wide(token_row[k]);
        z.value += x * w;
        z.size += std::fabs(x * w);
        // A matrix unit takes for 0 what is below 2^-126.
        z.error += 2e-5 * std::fabs(x * w) + 0x1p-125 * (std::fabs(x) + std::fabs(w) + 4);
      }
    });
    z.error = z.error * std::fabs(map.factor()) + 2e-5 * map.size(v, z.size) + 1e-35;
    z.value = map.z(v, z.value);
    return z;
  }
  // The largest size of a logit; NaN or infinite where an element is.
  double most(const float* hidden) {
    double all = 0;
    for (int64_t v = 0; v < vocab; ++v) {
      const double size = logit(hidden, v).size;
      if (!(size <= all)) all = size;
      if (!std::isfinite(all)) break;
    }
    return all;
  }
};

}  // namespace

FUZZ(dto_descent_latents) {
  // A pass is shared by 32 rows; a segment has 1,024 tokens, or more where the vocabulary has many.
  const int64_t rows = random.one_in(8) ? random.between(6, 70) : random.between(0, 5);
  const bool many = random.one_in(60);
  const int64_t vocab = many                ? random.between(33000, 40000)
                        : random.one_in(20) ? random.between(1000, 5000)
                                            : random.size(600);
  const int64_t width = random.between(0, many || rows > 5 ? 20 : 150);
  const int64_t iters = random.between(0, many || rows > 5 ? 3 : 10);
  Problem problem(random, rows, vocab, width, iters);
  Values values(random), heads(random);
  const bool strange = random.one_in(4);
  problem.parameter.each_row([&](float* row) {
    values.fill_plain(row, width);
    if (strange && width > 0 && random.one_in(12))
      row[random.between(0, width - 1)] = DescentProblem::strange_value(random);
  });
  int64_t spoiled = strange && random.one_in(6) ? random.between(0, vocab - 1) : -1;
  problem.head.with([&](auto& tensor) {
    tensor.each_row([&](auto* row) {
      heads.fill_plain(row, width);
      if (spoiled-- == 0 && width > 0)
        Values::set(row[random.between(0, width - 1)], DescentProblem::strange_value(random));
    });
  });
  problem.fill(random, strange);
  DescentCall call(random, nabla_fast_dto_descent_latents,
                   nabla_fast_dto_descent_latents_workspace);
  problem.give(random, call);
  call.reads(By::kOthers, call.args.head, problem.head);
  problem.map.give(call);
  if (random.one_in(3)) return call.check_refused();

  const State before = call.state();
  const std::vector<int64_t> start = problem.steps();
  const std::vector<char> given = problem.parameter.view().elements();
  const nabla_fast_status status = call.run();
  check(status == NABLA_FAST_OK || (rows > 0 && status == NABLA_FAST_BAD_ROWS),
        "right arguments are refused");
  call.check_inputs();
  const State after = call.state();
  bool good = true;
  for (int64_t r = 0; r < rows; ++r) {
    const nabla_fast_status found = problem.row_status[r];
    good = good && found == NABLA_FAST_OK;
    check(found >= NABLA_FAST_OK && found <= NABLA_FAST_ROW_ALL_MASKED, "a row's status");
    const float* const row = Tensor<float>::of(given) + r * width;
    // Products may be beyond fp32.
    if (problem.most(row) < 1e37) check(found == NABLA_FAST_OK, "a row has an answer");
    for (int64_t k = 0; k < width; ++k) {
      if (std::isnan(row[k])) check(found == NABLA_FAST_ROW_NAN, "the status of a NaN");
      if (std::isinf(row[k]) && problem.map.softcap == 0)
        check(found != NABLA_FAST_OK, "the status of an infinity");
    }
  }
  check(good == (status == NABLA_FAST_OK), "the call's status is not its rows'");
  if (!good) return problem.check_unchanged(call, before, after);
  problem.check_descended(call, start, before, after, rows > 5 ? 30 : 3);
  for (int64_t r = 0; r < rows; ++r) {
    const int64_t token = problem.token[r];
    check(token >= 0 && token < vocab, "the hard token is none of the vocabulary");
    const float* const row = problem.parameter.row(r);
    if (call.args.noise_seed || !(problem.most(row) < 1e37)) continue;
    const Logit best = problem.logit(row, token);
    for (int64_t v = 0; v < vocab; ++v) {
      const Logit z = problem.logit(row, v);
      check(z.value - z.error <= best.value + best.error, "the hard token is not the argmax");
    }
  }
}

}  // namespace fuzz
