#include "descent.h"

namespace fuzz {
namespace {

struct Call : DescentCall {
  const void* head;
  nabla_fast_dtype dtype;
  int64_t width, head_stride;

  int64_t bytes() const { return nabla_fast_dto_descent_latents_workspace(rows, vocab, width); }
  nabla_fast_status operator()(void* workspace, int64_t size) const {
    return nabla_fast_dto_descent_latents(
        parameter, head, dtype, grad, exp_avg, exp_avg_sq, step, rows, vocab, width,
        parameter_stride, head_stride, grad_stride, exp_avg_stride, exp_avg_sq_stride, schedule,
        iters, schedule_stride, until, group, tau, noise_seed, noise_position, token, flipped,
        row_status, workspace, size, threads);
  }
};

// Whether the workspace is to be too small as well.
bool spoil(Random& random, Call& call) {
  // Without columns or steps, what holds them may be null.
  int64_t what = random.between(call.width > 0 ? 0 : kSpoiledOthers, kSpoiled + 5);
  if (call.width == 0 && what == kSpoiled) what = kSpoiledOthers;
  if (call.iters == 0 && what == kSpoiled + 1) what = kSpoiledOthers;
  switch (what - kSpoiled) {
    case 0:
      call.head = nullptr;
      break;
    case 1:
      call.schedule = nullptr;
      break;
    case 2:
      call.width = random.negative();
      break;
    case 3:
      call.width = random.huge();
      break;
    case 4:
      call.dtype = random.pick<nabla_fast_dtype>({-1, 2, INT32_MAX, INT32_MIN});
      break;
    case 5:
      return true;
    default:
      spoil(random, static_cast<DescentCall&>(call), what);
      break;
  }
  spoil_strides(random, call);
  if (call.vocab > 1 && random.one_in(8)) call.head_stride = INT64_MIN;
  return false;
}

// In double.
struct Logit {
  double value = 0, size = 0;  // the sum of its terms, and of their absolute values
  double error = 0;            // by how much a kernel's may differ
};

template <typename T>
struct Problem : DescentProblem {
  Tensor<T> head;

  Problem(Random& random, int64_t n, int64_t v, int64_t w, int64_t k)
      : DescentProblem(random, n, v, w, k), head(random, {v}, w) {}

  // A logit of the hidden states as they are.
  Logit logit(int64_t r, int64_t v) {
    Logit z;
    const float* const hidden = parameter.row(r);
    const T* const token_row = head.row(v);
    for (int64_t k = 0; k < width; ++k) {
      const double x = hidden[k], w = Values::wide(token_row[k]);
      z.value += x * w;
      z.size += std::fabs(x * w);
      // A matrix unit takes for 0 what is below 2^-126.
      z.error += 2e-5 * std::fabs(x * w) + 0x1p-125 * (std::fabs(x) + std::fabs(w) + 4);
    }
    return z;
  }
  // The largest size of a logit; NaN or infinite where an element is.
  double most(int64_t r) {
    double all = 0;
    for (int64_t v = 0; v < vocab; ++v) {
      const double size = logit(r, v).size;
      if (!(size <= all)) all = size;
      if (!std::isfinite(all)) break;
    }
    return all;
  }
};

template <typename T>
void one(Random& random, nabla_fast_dtype dtype) {
  // A pass is shared by 32 rows; a segment has 1,024 tokens, or more where the vocabulary has many.
  const int64_t rows = random.one_in(8) ? random.between(6, 70) : random.between(0, 5);
  const bool many = random.one_in(60);
  const int64_t vocab = many                ? random.between(33000, 40000)
                        : random.one_in(20) ? random.between(1000, 5000)
                                            : random.size(600);
  const int64_t width = random.between(0, many || rows > 5 ? 20 : 150);
  const int64_t iters = random.between(0, many || rows > 5 ? 3 : 10);
  Problem<T> problem(random, rows, vocab, width, iters);
  Values values(random), heads(random);
  const bool strange = random.one_in(4);
  problem.parameter.each_row([&](float* row) {
    values.fill_plain(row, width);
    if (strange && width > 0 && random.one_in(12))
      row[random.between(0, width - 1)] = DescentProblem::strange_value(random);
  });
  int64_t spoiled = strange && random.one_in(6) ? random.between(0, vocab - 1) : -1;
  problem.head.each_row([&](T* row) {
    heads.fill_plain(row, width);
    if (spoiled-- == 0 && width > 0)
      Values::set(row[random.between(0, width - 1)], DescentProblem::strange_value(random));
  });
  problem.fill(random, strange);
  Call call{problem.call(random), problem.head.data(), dtype, width, problem.head.stride(0)};
  if (random.one_in(4)) call.schedule_stride = 0;
  // What is not there has no address, and what is one has no distance to the next.
  if (width == 0 && random.one_in(2)) {
    call.parameter = call.exp_avg = call.exp_avg_sq = nullptr;
    call.head = nullptr;
  }
  const auto any_stride = [&] { return random.one_in(2) ? random.huge() : random.negative(); };
  if (width == 0 && random.one_in(2)) call.head_stride = any_stride();
  if (width == 0 && random.one_in(3))
    call.parameter_stride = call.exp_avg_stride = call.exp_avg_sq_stride = any_stride();
  if (iters == 0 && random.one_in(4)) call.schedule_stride = any_stride();

  if (random.one_in(3)) {
    const bool small = spoil(random, call);
    if (rows > 0 && random.one_in(8))
      problem.step[random.between(0, rows - 1)] = random.pick<int64_t>({-1, INT64_MIN});
    if (rows > 0 && random.one_in(8))
      problem.until[random.between(0, rows - 1)] = random.pick<int64_t>({iters + 1, INT64_MAX});
    check_refused(random, problem, call, small);
    check(problem.head.untouched(), "a refused call has written");
    return;
  }

  const DescentState before = problem.state();
  std::vector<double> most;
  for (int64_t r = 0; r < rows; ++r) most.push_back(problem.most(r));
  const nabla_fast_status status = run(random, call, 0xFF);
  check(problem.grad.untouched() && problem.schedule.untouched() && problem.head.untouched(),
        "inputs have changed");
  const DescentState after = problem.state();
  check(status == NABLA_FAST_OK || (rows > 0 && status == NABLA_FAST_BAD_ROWS),
        "right arguments are refused");
  bool good = true;
  for (int64_t r = 0; r < rows; ++r) {
    const nabla_fast_status found = problem.row_status[r];
    good = good && found == NABLA_FAST_OK;
    check(found >= NABLA_FAST_OK && found <= NABLA_FAST_ROW_ALL_MASKED, "a row's status");
    // Products may be beyond fp32.
    if (most[static_cast<size_t>(r)] < 1e37) check(found == NABLA_FAST_OK, "a row has an answer");
    const float* const row = before.parameter.data() + r * width;
    for (int64_t k = 0; k < width; ++k) {
      if (std::isnan(row[k])) check(found == NABLA_FAST_ROW_NAN, "the status of a NaN");
      if (std::isinf(row[k])) check(found != NABLA_FAST_OK, "the status of an infinity");
    }
  }
  check(good == (status == NABLA_FAST_OK), "the call's status is not its rows'");
  if (!good) {
    check(after == before, "rows without an answer have changed");
    return;
  }
  check_again(random, problem, call, before, after);
  problem.check_steps(before, after, call);
  for (int64_t r = 0; r < rows; ++r) {
    const int64_t token = problem.token[r];
    check(token >= 0 && token < vocab, "the hard token is none of the vocabulary");
    if (call.noise_seed || !(problem.most(r) < 1e37)) continue;
    const Logit best = problem.logit(r, token);
    for (int64_t v = 0; v < vocab; ++v) {
      const Logit z = problem.logit(r, v);
      check(z.value - z.error <= best.value + best.error, "the hard token is not the argmax");
    }
  }
  check_rows_alone(random, problem, call, before, after, rows > 5 ? 30 : 3);
}

}  // namespace

FUZZ(dto_descent_latents) {
  if (random.one_in(2))
    one<float>(random, NABLA_FAST_FLOAT32);
  else
    one<uint16_t>(random, NABLA_FAST_BFLOAT16);
}

}  // namespace fuzz
