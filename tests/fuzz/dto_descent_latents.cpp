#include "fuzz.h"

namespace fuzz {
namespace {

struct Call {
  float* h;
  const void* head;
  nabla_fast_dtype dtype;
  const float* grad;
  float *exp_avg, *exp_avg_sq;
  int64_t* step;
  int64_t rows, vocab, width;
  int64_t h_stride, head_stride, grad_stride, exp_avg_stride, exp_avg_sq_stride;
  const double* schedule;
  int64_t iters, schedule_stride;
  const int64_t *until, *group;
  double tau;
  const int64_t *noise_seed, *noise_position;
  int64_t* token;
  uint8_t* flipped;
  nabla_fast_status* row_status;
  int32_t threads;

  int64_t bytes() const { return nabla_fast_dto_descent_latents_workspace(rows, vocab, width); }
  nabla_fast_status operator()(void* workspace, int64_t size) const {
    return nabla_fast_dto_descent_latents(
        h, head, dtype, grad, exp_avg, exp_avg_sq, step, rows, vocab, width, h_stride, head_stride,
        grad_stride, exp_avg_stride, exp_avg_sq_stride, schedule, iters, schedule_stride, until,
        group, tau, noise_seed, noise_position, token, flipped, row_status, workspace, size,
        threads);
  }
};

// Whether the workspace is to be too small as well.
bool spoil(Random& random, Call& call) {
  // Without columns or steps, what holds them may be null.
  int64_t what = random.between(call.width > 0 ? 0 : 4, 21);
  if (what == 4 && call.iters == 0) what = 5;
  switch (what) {
    case 0:
      call.h = nullptr;
      break;
    case 1:
      call.head = nullptr;
      break;
    case 2:
      call.exp_avg = nullptr;
      break;
    case 3:
      call.exp_avg_sq = nullptr;
      break;
    case 4:
      call.schedule = nullptr;
      break;
    case 5:
      call.grad = nullptr;
      break;
    case 6:
      call.step = nullptr;
      break;
    case 7:
      call.token = nullptr;
      break;
    case 8:
      call.flipped = nullptr;
      break;
    case 9:
      call.row_status = nullptr;
      break;
    case 10:
      call.rows = random.negative();
      break;
    case 11:
      call.vocab = random.pick<int64_t>({0, random.negative()});
      break;
    case 12:
      call.width = random.negative();
      break;
    case 13:
      call.iters = random.negative();
      break;
    case 14:
      call.rows = random.huge();
      break;
    case 15:
      call.vocab = random.huge();
      break;
    case 16:
      call.width = random.huge();
      break;
    case 17:
      call.iters = random.huge();
      break;
    case 18:
      call.tau = random.wrong_tau();
      break;
    case 19:
      // A seed without a position.
      call.noise_position = nullptr;
      call.noise_seed = call.step;
      break;
    case 20:
      call.dtype = random.pick<nabla_fast_dtype>({-1, 2, INT32_MAX, INT32_MIN});
      break;
    default:
      return true;
  }
  if (call.rows > 1 && random.one_in(8)) call.h_stride = random.huge();
  if (call.vocab > 1 && random.one_in(8)) call.head_stride = INT64_MIN;
  if (call.rows > 1 && random.one_in(8)) call.exp_avg_sq_stride = INT64_MIN;
  return false;
}

// What a call changes: each of it once.
struct State {
  std::vector<float> h, exp_avg, exp_avg_sq;
  std::vector<int64_t> step, token;
  std::vector<uint8_t> flipped;

  bool operator==(const State& other) const {
    return same(h, other.h) && same(exp_avg, other.exp_avg) && same(exp_avg_sq, other.exp_avg_sq) &&
           step == other.step && token == other.token && flipped == other.flipped;
  }
};

// In double.
struct Logit {
  double value = 0, size = 0;  // the sum of its terms, and of their absolute values
  double error = 0;            // by how much a kernel's may differ
};

template <typename T>
struct Problem {
  int64_t rows, vocab, width, iters;
  Tensor<float> h, grad, exp_avg, exp_avg_sq;
  Tensor<T> head;
  Tensor<double> schedule;
  Memory<int64_t> step, until, group, seed, position, token;
  Memory<uint8_t> flipped;
  Memory<nabla_fast_status> row_status;

  Problem(Random& random, int64_t n, int64_t v, int64_t w, int64_t k)
      : rows(n),
        vocab(v),
        width(w),
        iters(k),
        h(random, {n}, w),
        grad(random, {n}, v),
        exp_avg(random, {n}, w),
        exp_avg_sq(random, {n}, w),
        head(random, {v}, w),
        schedule(random, {n}, k),
        step(random, n),
        until(random, n),
        group(random, n),
        seed(random, n),
        position(random, n),
        token(random, n),
        flipped(random, n),
        row_status(random, n) {}

  State state() {
    const auto list = [](const auto& memory) {
      return std::vector<std::decay_t<decltype(memory[0])>>(memory.data(),
                                                            memory.data() + memory.count());
    };
    return {h.elements(), exp_avg.elements(), exp_avg_sq.elements(),
            list(step),   list(token),        list(flipped)};
  }
  void put(const State& state) {
    h.put(state.h);
    exp_avg.put(state.exp_avg);
    exp_avg_sq.put(state.exp_avg_sq);
    std::copy(state.step.begin(), state.step.end(), step.data());
  }
  Call call(Random& random, nabla_fast_dtype dtype) {
    return {h.data(),
            head.data(),
            dtype,
            grad.data(),
            exp_avg.data(),
            exp_avg_sq.data(),
            step.data(),
            rows,
            vocab,
            width,
            h.stride(0),
            head.stride(0),
            grad.stride(0),
            exp_avg.stride(0),
            exp_avg_sq.stride(0),
            schedule.data(),
            iters,
            schedule.stride(0),
            nullptr,
            nullptr,
            1.0,
            nullptr,
            nullptr,
            token.data(),
            flipped.data(),
            row_status.data(),
            random.threads()};
  }
  // A logit of h as it is.
  Logit logit(int64_t r, int64_t v) {
    Logit z;
    const float* const hidden = h.row(r);
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
  Values values(random), heads(random), gradients(random);
  const bool strange = random.one_in(4);
  const auto strange_value = [&] { return random.pick({kNaN, kInfinity, -kInfinity, 1e38f}); };
  problem.h.each_row([&](float* row) {
    values.fill_plain(row, width);
    if (strange && width > 0 && random.one_in(12))
      row[random.between(0, width - 1)] = strange_value();
  });
  int64_t spoiled = strange && random.one_in(6) ? random.between(0, vocab - 1) : -1;
  problem.head.each_row([&](T* row) {
    heads.fill_plain(row, width);
    if (spoiled-- == 0 && width > 0)
      Values::set(row[random.between(0, width - 1)], strange_value());
  });
  problem.grad.each_row([&](float* row) {
    gradients.fill_plain(row, vocab);
    if (strange && random.one_in(3)) row[random.between(0, vocab - 1)] = strange_value();
  });
  const bool fresh = random.one_in(2);
  problem.exp_avg.each_row([&](float* row) {
    for (int64_t k = 0; k < width; ++k) row[k] = fresh ? 0 : 0.01f * gradients.plain();
  });
  problem.exp_avg_sq.each_row([&](float* row) {
    for (int64_t k = 0; k < width; ++k) row[k] = fresh ? 0 : 1e-4f * std::fabs(gradients.plain());
  });
  problem.schedule.each_row([&](double* row) {
    for (int64_t k = 0; k < iters; ++k) row[k] = random.pick({0.01, 0.1, 0.5, 0.0});
    if (strange && iters > 0 && random.one_in(6))
      row[random.between(0, iters - 1)] = random.pick({HUGE_VAL, double{kNaN}, 1e300, -1.0});
  });
  for (int64_t r = 0; r < rows; ++r) {
    problem.step[r] = fresh ? 0 : random.between(0, iters);
    problem.until[r] = random.one_in(20) ? INT64_MIN : random.between(0, iters);
    problem.group[r] = random.pick<int64_t>({0, 0, 1, -5, INT64_MAX, INT64_MIN});
    problem.seed[r] = static_cast<int64_t>(random.next());
    problem.position[r] = random.pick<int64_t>({0, 1, 12345, INT64_MAX});
  }
  Call call = problem.call(random, dtype);
  call.tau = random.tau();
  if (random.one_in(2)) call.until = problem.until.data();
  if (random.one_in(2)) call.group = problem.group.data();
  if (random.one_in(3)) {
    call.noise_seed = problem.seed.data();
    call.noise_position = problem.position.data();
  }
  if (random.one_in(4)) call.schedule_stride = 0;
  // What is not there has no address, and what is one has no distance to the next.
  if (width == 0 && random.one_in(2)) {
    call.h = call.exp_avg = call.exp_avg_sq = nullptr;
    call.head = nullptr;
  }
  const auto any_stride = [&] { return random.one_in(2) ? random.huge() : random.negative(); };
  if ((vocab == 1 || width == 0) && random.one_in(2)) call.head_stride = any_stride();
  if ((rows == 1 || width == 0) && random.one_in(3))
    call.h_stride = call.exp_avg_stride = call.exp_avg_sq_stride = any_stride();
  if (rows == 1 && random.one_in(4)) call.grad_stride = any_stride();
  if ((rows == 1 || iters == 0) && random.one_in(4)) call.schedule_stride = any_stride();
  const State before = problem.state();

  if (random.one_in(3)) {
    const bool small = spoil(random, call);
    if (rows > 0 && random.one_in(8))
      problem.step[random.between(0, rows - 1)] = random.pick<int64_t>({-1, INT64_MIN});
    if (rows > 0 && random.one_in(8))
      problem.until[random.between(0, rows - 1)] = random.pick<int64_t>({iters + 1, INT64_MAX});
    const State given = problem.state();
    const int64_t bytes = call.bytes();
    check(bytes >= 0, "a size is negative");
    const int64_t size = small && bytes > 0 ? bytes - 1 : std::min<int64_t>(bytes, 1 << 20);
    Workspace workspace(random, size, 0xAA);
    const nabla_fast_status status = call(workspace.data(), size);
    check(refuses(status) || (rows == 0 && status == NABLA_FAST_OK),
          "wrong arguments are accepted");
    check(problem.state() == given && problem.grad.untouched() && problem.head.untouched(),
          "a refused call has written");
    return;
  }

  const auto run = [&](const Call& c, int fill) {
    Workspace workspace(random, c.bytes(), fill);
    return c(workspace.data(), c.bytes());
  };
  std::vector<double> most;
  for (int64_t r = 0; r < rows; ++r) most.push_back(problem.most(r));
  const nabla_fast_status status = run(call, 0xFF);
  check(problem.grad.untouched() && problem.schedule.untouched() && problem.head.untouched(),
        "inputs have changed");
  const State after = problem.state();
  check(status == NABLA_FAST_OK || (rows > 0 && status == NABLA_FAST_BAD_ROWS),
        "right arguments are refused");
  bool good = true;
  for (int64_t r = 0; r < rows; ++r) {
    const nabla_fast_status found = problem.row_status[r];
    good = good && found == NABLA_FAST_OK;
    check(found >= NABLA_FAST_OK && found <= NABLA_FAST_ROW_ALL_MASKED, "a row's status");
    // Products may be beyond fp32.
    if (most[static_cast<size_t>(r)] < 1e37) check(found == NABLA_FAST_OK, "a row has an answer");
    const float* const row = before.h.data() + r * width;
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
  problem.put(before);
  call.threads = random.threads();
  check(run(call, 0) == NABLA_FAST_OK && problem.state() == after,
        "the result depends on the threads or on what the workspace holds");

  for (int64_t r = 0; r < rows; ++r) {
    const size_t index = static_cast<size_t>(r);
    const int64_t last = call.until ? problem.until[r] : iters;
    check(problem.row_status[r] == NABLA_FAST_OK, "a row's status");
    check(after.step[index] >= before.step[index] &&
              after.step[index] <= std::max(last, before.step[index]),
          "the steps of a row");
    check(after.flipped[index] <= (after.step[index] > before.step[index]),
          "a token moved without a step");
    const int64_t token = problem.token[r];
    check(token >= 0 && token < vocab, "the hard token is none of the vocabulary");
    if (call.noise_seed || !(problem.most(r) < 1e37)) continue;
    const Logit best = problem.logit(r, token);
    for (int64_t v = 0; v < vocab; ++v) {
      const Logit z = problem.logit(r, v);
      check(z.value - z.error <= best.value + best.error, "the hard token is not the argmax");
    }
  }
  if (call.group) return;
  for (int64_t r = 0; r < rows; r += random.between(1, rows > 5 ? 30 : 3)) {
    problem.put(before);
    Call alone = call;
    if (call.h) {
      alone.h = problem.h.row(r);
      alone.exp_avg = problem.exp_avg.row(r);
      alone.exp_avg_sq = problem.exp_avg_sq.row(r);
    }
    alone.grad = problem.grad.row(r);
    alone.step += r;
    alone.rows = 1;
    if (call.schedule_stride != 0) alone.schedule = problem.schedule.row(r);
    if (call.until) alone.until += r;
    if (call.noise_seed) {
      alone.noise_seed += r;
      alone.noise_position += r;
    }
    alone.token += r;
    alone.flipped += r;
    alone.row_status += r;
    check(run(alone, 0x55) == NABLA_FAST_OK, "a row alone is refused");
    const size_t index = static_cast<size_t>(r);
    check(same(problem.h.row(r), after.h.data() + r * width, width) &&
              same(problem.exp_avg.row(r), after.exp_avg.data() + r * width, width) &&
              same(problem.exp_avg_sq.row(r), after.exp_avg_sq.data() + r * width, width) &&
              problem.step[r] == after.step[index] && problem.token[r] == after.token[index] &&
              problem.flipped[r] == after.flipped[index],
          "a row's result depends on the others");
  }
}

}  // namespace

FUZZ(dto_descent_latents) {
  if (random.one_in(2))
    one<float>(random, NABLA_FAST_FLOAT32);
  else
    one<uint16_t>(random, NABLA_FAST_BFLOAT16);
}

}  // namespace fuzz
