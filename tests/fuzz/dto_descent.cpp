#include "fuzz.h"

namespace fuzz {
namespace {

struct Call {
  float* z;
  const float* grad;
  float *exp_avg, *exp_avg_sq;
  int64_t* step;
  int64_t rows, vocab, z_stride, grad_stride, exp_avg_stride, exp_avg_sq_stride;
  const double* schedule;
  int64_t iters, schedule_stride;
  const int64_t *until, *group;
  double tau;
  const int64_t *noise_seed, *noise_position;
  int64_t* token;
  uint8_t* flipped;
  nabla_fast_status* row_status;
  int32_t threads;

  int64_t bytes() const {
    return nabla_fast_dto_descent_workspace(rows, vocab, iters, noise_seed != nullptr,
                                            group != nullptr, threads);
  }
  nabla_fast_status operator()(void* workspace, int64_t size) const {
    return nabla_fast_dto_descent(z, grad, exp_avg, exp_avg_sq, step, rows, vocab, z_stride,
                                  grad_stride, exp_avg_stride, exp_avg_sq_stride, schedule, iters,
                                  schedule_stride, until, group, tau, noise_seed, noise_position,
                                  token, flipped, row_status, workspace, size, threads);
  }
};

// Whether the workspace is to be too small as well.
bool spoil(Random& random, Call& call) {
  switch (random.between(0, 16)) {
    case 0:
      call.z = nullptr;
      break;
    case 1:
      call.grad = nullptr;
      break;
    case 2:
      call.exp_avg = nullptr;
      break;
    case 3:
      call.exp_avg_sq = nullptr;
      break;
    case 4:
      call.step = nullptr;
      break;
    case 5:
      call.token = nullptr;
      break;
    case 6:
      call.flipped = nullptr;
      break;
    case 7:
      call.row_status = nullptr;
      break;
    case 8:
      call.rows = random.negative();
      break;
    case 9:
      call.vocab = random.pick<int64_t>({0, random.negative()});
      break;
    case 10:
      call.iters = random.negative();
      break;
    case 11:
      call.rows = random.huge();
      break;
    case 12:
      call.vocab = random.huge();
      break;
    case 13:
      call.iters = random.huge();
      break;
    case 14:
      call.tau = random.wrong_tau();
      break;
    case 15:
      // A seed without a position.
      call.noise_position = nullptr;
      call.noise_seed = call.step;
      break;
    default:
      return true;
  }
  if (call.rows > 1 && random.one_in(8)) call.z_stride = random.huge();
  if (call.rows > 1 && random.one_in(8)) call.exp_avg_sq_stride = INT64_MIN;
  return false;
}

// What a call changes: each of it once.
struct State {
  std::vector<float> z, exp_avg, exp_avg_sq;
  std::vector<int64_t> step, token;
  std::vector<uint8_t> flipped;

  bool operator==(const State& other) const {
    return same(z, other.z) && same(exp_avg, other.exp_avg) && same(exp_avg_sq, other.exp_avg_sq) &&
           step == other.step && token == other.token && flipped == other.flipped;
  }
};

struct Problem {
  int64_t rows, vocab, iters;
  Tensor<float> z, grad, exp_avg, exp_avg_sq;
  Tensor<double> schedule;
  Memory<int64_t> step, until, group, seed, position, token;
  Memory<uint8_t> flipped;
  Memory<nabla_fast_status> row_status;

  Problem(Random& random, int64_t n, int64_t v, int64_t k)
      : rows(n),
        vocab(v),
        iters(k),
        z(random, {n}, v),
        grad(random, {n}, v),
        exp_avg(random, {n}, v),
        exp_avg_sq(random, {n}, v),
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
    return {z.elements(), exp_avg.elements(), exp_avg_sq.elements(),
            list(step),   list(token),        list(flipped)};
  }
  void put(const State& state) {
    z.put(state.z);
    exp_avg.put(state.exp_avg);
    exp_avg_sq.put(state.exp_avg_sq);
    std::copy(state.step.begin(), state.step.end(), step.data());
  }
  Call call(Random& random) {
    return {z.data(),
            grad.data(),
            exp_avg.data(),
            exp_avg_sq.data(),
            step.data(),
            rows,
            vocab,
            z.stride(0),
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
};

}  // namespace

FUZZ(dto_descent) {
  const int64_t rows = random.between(0, 5), iters = random.between(0, 12);
  const int64_t vocab = random.one_in(40) ? random.between(60000, 80000) : random.size(4000);
  Problem problem(random, rows, vocab, iters);
  Values values(random), gradients(random);
  const bool strange = random.one_in(4);
  problem.z.each_row([&](float* row) {
    if (strange)
      values.fill_logits(row, vocab);
    else
      values.fill_plain(row, vocab);
    // A token to leave.
    row[random.between(0, vocab - 1)] += static_cast<float>(random.between(0, 3));
  });
  problem.grad.each_row([&](float* row) {
    gradients.fill_plain(row, vocab);
    if (strange && random.one_in(3))
      row[random.between(0, vocab - 1)] = random.pick({kNaN, kInfinity, -kInfinity, 1e38f});
  });
  const bool fresh = random.one_in(2);
  problem.exp_avg.each_row([&](float* row) {
    for (int64_t v = 0; v < vocab; ++v) row[v] = fresh ? 0 : 0.01f * gradients.plain();
  });
  problem.exp_avg_sq.each_row([&](float* row) {
    for (int64_t v = 0; v < vocab; ++v) row[v] = fresh ? 0 : 1e-4f * std::fabs(gradients.plain());
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
  Call call = problem.call(random);
  call.tau = random.tau();
  if (random.one_in(2)) call.until = problem.until.data();
  if (random.one_in(2)) call.group = problem.group.data();
  if (random.one_in(3)) {
    call.noise_seed = problem.seed.data();
    call.noise_position = problem.position.data();
  }
  const State before = problem.state();

  if (random.one_in(3)) {
    const bool small = spoil(random, call);
    if (rows > 0 && random.one_in(8))
      problem.step[random.between(0, rows - 1)] = random.pick<int64_t>({-1, INT64_MIN});
    const State given = problem.state();
    const int64_t bytes = call.bytes();
    check(bytes >= 0, "a size is negative");
    const int64_t size = small && bytes > 0 ? bytes - 1 : std::min<int64_t>(bytes, 1 << 20);
    Workspace workspace(random, size, 0xAA);
    const nabla_fast_status status = call(workspace.data(), size);
    check(refuses(status) || (rows == 0 && status == NABLA_FAST_OK),
          "wrong arguments are accepted");
    check(problem.state() == given && problem.grad.untouched(), "a refused call has written");
    return;
  }

  const auto run = [&](const Call& c, int fill) {
    Workspace workspace(random, c.bytes(), fill);
    return c(workspace.data(), c.bytes());
  };
  bool good = true;
  for (int64_t r = 0; r < rows; ++r)
    good = good && status_of(problem.z.row(r), vocab) == NABLA_FAST_OK;
  const nabla_fast_status status = run(call, 0xFF);
  check(problem.grad.untouched() && problem.schedule.untouched(), "inputs have changed");
  const State after = problem.state();
  check(status == (good ? NABLA_FAST_OK : NABLA_FAST_BAD_ROWS), "right arguments are refused");
  if (!good) {
    check(after == before, "rows without an answer have changed");
    problem.put(before);
    for (int64_t r = 0; r < rows; ++r)
      check(problem.row_status[r] == status_of(problem.z.row(r), vocab), "a row's status");
    return;
  }
  problem.put(before);
  call.threads = random.threads();
  check(run(call, 0) == NABLA_FAST_OK && problem.state() == after,
        "the result depends on the threads or on what the workspace holds");

  for (int64_t r = 0; r < rows; ++r) {
    const int64_t most = call.until ? problem.until[r] : iters;
    check(problem.row_status[r] == NABLA_FAST_OK, "a row's status");
    check(after.step[static_cast<size_t>(r)] >= before.step[static_cast<size_t>(r)] &&
              after.step[static_cast<size_t>(r)] <=
                  std::max(most, before.step[static_cast<size_t>(r)]),
          "the steps of a row");
    const float* row = problem.z.row(r);
    bool clean = true;
    for (int64_t v = 0; v < vocab; ++v) clean = clean && row[v] < kInfinity;
    if (clean && !call.noise_seed)
      check(problem.token[r] == argmax(row, vocab), "the hard token is not the argmax");
    const float* start = before.z.data() + r * vocab;
    for (int64_t v = 0; v < vocab && clean; ++v)
      check(start[v] != -kInfinity || row[v] == -kInfinity, "a masked token came back");
  }
  if (call.group) return;
  for (int64_t r = 0; r < rows; r += random.between(1, 3)) {
    problem.put(before);
    Call alone = call;
    alone.z = problem.z.row(r);
    alone.grad = problem.grad.row(r);
    alone.exp_avg = problem.exp_avg.row(r);
    alone.exp_avg_sq = problem.exp_avg_sq.row(r);
    alone.step += r;
    alone.rows = 1;
    alone.schedule = problem.schedule.row(r);
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
    check(same(problem.z.row(r), after.z.data() + r * vocab, vocab) &&
              same(problem.exp_avg.row(r), after.exp_avg.data() + r * vocab, vocab) &&
              same(problem.exp_avg_sq.row(r), after.exp_avg_sq.data() + r * vocab, vocab) &&
              problem.step[r] == after.step[index] && problem.token[r] == after.token[index] &&
              problem.flipped[r] == after.flipped[index],
          "a row's result depends on the others");
  }
}

}  // namespace fuzz
