#include "fuzz.h"
#include "matrix.h"

namespace fuzz {
namespace {

struct Problem {
  int64_t rows, vocab;
  bool linear;
  std::vector<Matrix> inputs;  // logits, or hidden and head
  std::vector<Matrix> tables, cotangents;
  std::vector<Matrix> direct;  // none or one
  std::vector<nabla_fast_table> of_tables, of_cotangents;
  nabla_fast_table of_direct{};
  Memory<int64_t> seed, position;
  nabla_fast_mix call{};

  explicit Problem(Random& random) {
    rows = random.one_in(12) ? random.between(60, 140) : random.between(0, 9);
    vocab = random.one_in(15) ? random.between(2000, 5000) : random.size(700);
    linear = random.one_in(2);
    Values values(random), gradients(random);
    if (linear) {
      const int64_t width = random.between(1, 100);
      inputs.emplace_back(random, rows, width, dtype(random));
      inputs.emplace_back(random, vocab, width, dtype(random));
      for (Matrix& matrix : inputs) matrix.plain(values);
      call.hidden = inputs[0].table();
      call.head = inputs[1].table();
    } else {
      inputs.emplace_back(random, rows, vocab, dtype(random));
      inputs[0].logits(values);
      call.logits = inputs[0].table();
    }
    const int64_t count = random.between(0, 3);
    for (int64_t t = 0; t < count; ++t) {
      const int64_t width = random.between(1, 150);
      tables.emplace_back(random, vocab, width, dtype(random));
      tables.back().plain(gradients);
      cotangents.emplace_back(random, rows, width, dtype(random));
      cotangents.back().plain(gradients);
      of_tables.push_back(tables.back().table());
      of_cotangents.push_back(cotangents.back().table());
    }
    if (random.one_in(2)) {
      direct.emplace_back(random, rows, vocab, dtype(random));
      direct[0].plain(gradients);
      of_direct = direct[0].table();
    }
    call.rows = rows;
    call.vocab = vocab;
    call.tau = random.pick({1.0, 0.7, 10.0, 0.05});
    call.table_count = count;
    call.tables = of_tables.data();
    seed = Memory<int64_t>(random, rows);
    position = Memory<int64_t>(random, rows);
    if (random.one_in(3)) {
      call.noise_seed = seed.data();
      call.noise_position = position.data();
    }
  }
  bool untouched() {
    bool same = true;
    for (auto* matrices : {&inputs, &tables, &cotangents, &direct})
      for (Matrix& matrix : *matrices) same = matrix.untouched() && same;
    return same;
  }
};

// One thing wrong with what both functions are given.
void spoil(Random& random, Problem& problem) {
  nabla_fast_mix& call = problem.call;
  nabla_fast_table& input = problem.linear ? call.head : call.logits;
  switch (random.between(0, 13)) {
    case 0:
      call.rows = random.negative();
      break;
    case 1:
      call.rows = random.huge();
      break;
    case 2:
      call.vocab = random.pick<int64_t>({0, random.negative()});
      break;
    case 3:
      call.vocab = random.huge();
      break;
    case 4:
      call.table_count = random.negative();
      break;
    case 5:
      call.table_count = random.huge();
      break;
    case 6:
      call.tau = random.wrong_tau();
      break;
    case 7:
      input.dtype = random.pick<nabla_fast_dtype>({-1, 2, INT32_MAX});
      break;
    case 8:
      input.width = random.pick<int64_t>({random.negative(), random.huge()});
      break;
    case 9:
      if (problem.linear)
        call.head.data = nullptr;
      else
        ++call.logits.width;
      break;
    case 10:
      call.noise_seed = call.noise_seed ? nullptr : problem.seed.data();
      call.noise_position = call.noise_seed ? nullptr : problem.position.data();
      break;
    default:
      if (problem.of_tables.empty()) {
        call.rows = -1;
      } else {
        nabla_fast_table& table = problem.of_tables[0];
        switch (random.between(0, 3)) {
          case 0:
            table.data = nullptr;
            break;
          case 1:
            table.dtype = 7;
            break;
          case 2:
            table.width = random.pick<int64_t>({-1, random.huge()});
            break;
          default:
            call.tables = nullptr;
            break;
        }
      }
  }
}

// Statuses of all rows, where they can be known without the kernel.
void check_statuses(Problem& problem, const Memory<nabla_fast_status>& status) {
  for (int64_t r = 0; r < problem.rows; ++r) {
    check(status[r] >= NABLA_FAST_OK && status[r] <= NABLA_FAST_ROW_ALL_MASKED, "a row's status");
    if (!problem.linear)
      check(status[r] == problem.inputs[0].status(r), "a row's status is not that of its logits");
  }
}

}  // namespace

FUZZ(embedding_mix) {
  Problem problem(random);
  const int32_t hard = random.one_in(2);
  int32_t threads = random.threads();
  std::vector<Memory<float>> mixes;
  std::vector<float*> into;
  for (const nabla_fast_table& table : problem.of_tables)
    mixes.emplace_back(random, problem.rows * table.width);
  for (Memory<float>& mix : mixes) into.push_back(mix.data());
  Memory<nabla_fast_status> status(random, problem.rows);
  const auto run = [&](int fill, int64_t short_by) {
    const int64_t bytes = nabla_fast_embedding_mix_workspace(&problem.call, hard, threads);
    check(bytes >= 0, "a size is negative");
    const int64_t size = std::max<int64_t>(std::min<int64_t>(bytes, 1 << 28) - short_by, 0);
    Workspace workspace(random, size, fill);
    return nabla_fast_embedding_mix(&problem.call, hard, into.data(), status.data(),
                                    workspace.data(), size, threads);
  };
  if (random.one_in(3)) {
    const auto mixes_before = mixes;
    const auto status_before = status;
    const bool small = random.one_in(8);
    if (!small) spoil(random, problem);
    const nabla_fast_status refused = run(0xAA, small);
    check(refuses(refused) || (problem.rows == 0 && refused == NABLA_FAST_OK),
          "wrong arguments are accepted");
    for (size_t t = 0; t < mixes.size(); ++t)
      check(same(mixes[t], mixes_before[t]), "a refused call has written");
    check(same(status, status_before), "a refused call has written");
    return;
  }
  check(run(0xFF, 0) == NABLA_FAST_OK, "right arguments are refused");
  check(problem.untouched(), "inputs have changed");
  check_statuses(problem, status);
  const auto found = mixes;
  const auto statuses = status;
  check(run(0, 0) == NABLA_FAST_OK && same(status, statuses), "a second call");
  for (size_t t = 0; t < mixes.size(); ++t)
    check(same(mixes[t], found[t]), "the result depends on what the workspace holds");
}

FUZZ(embedding_mix_backward) {
  Problem problem(random);
  int32_t threads = random.threads();
  const int64_t width = problem.linear ? problem.call.head.width : problem.vocab;
  Matrix grad(random, problem.rows, width,
              problem.linear ? NABLA_FAST_FLOAT32 : problem.call.logits.dtype);
  const nabla_fast_table to = grad.table();
  void* into = const_cast<void*>(to.data);
  int64_t stride = to.stride;
  Memory<nabla_fast_status> status(random, problem.rows);
  const nabla_fast_table* cotangents = problem.of_cotangents.data();
  const auto run = [&](int fill, int64_t short_by) {
    const int64_t bytes =
        nabla_fast_embedding_mix_backward_workspace(&problem.call, cotangents, threads);
    check(bytes >= 0, "a size is negative");
    const int64_t size = std::max<int64_t>(std::min<int64_t>(bytes, 1 << 28) - short_by, 0);
    Workspace workspace(random, size, fill);
    return nabla_fast_embedding_mix_backward(
        &problem.call, cotangents, problem.direct.empty() ? nullptr : &problem.of_direct, into,
        stride, status.data(), workspace.data(), size, threads);
  };
  if (random.one_in(3)) {
    const auto status_before = status;
    int64_t small = 0;
    switch (random.between(0, 7)) {
      case 0:
        small = 1;
        break;
      case 1:
        into = nullptr;
        break;
      case 2:
        if (problem.rows > 1)
          stride = random.huge();
        else
          into = nullptr;
        break;
      case 3:
        if (problem.of_cotangents.empty())
          into = nullptr;
        else
          problem.of_cotangents[0].width += random.pick<int64_t>({1, -1, 1 << 20});
        break;
      default:
        spoil(random, problem);
        break;
    }
    const nabla_fast_status refused = run(0xAA, small);
    check(refuses(refused) || (problem.rows == 0 && refused == NABLA_FAST_OK),
          "wrong arguments are accepted");
    check(grad.untouched() && same(status, status_before), "a refused call has written");
    return;
  }
  const auto elements = [&] {
    return grad.with([](auto& tensor) {
      std::vector<double> all;
      for (const auto element : tensor.elements()) all.push_back(element);
      return all;
    });
  };
  check(run(0xFF, 0) == NABLA_FAST_OK, "right arguments are refused");
  check(problem.untouched(), "inputs have changed");
  check_statuses(problem, status);
  const auto found = elements();
  const auto statuses = status;
  check(run(0, 0) == NABLA_FAST_OK && same(status, statuses) && same(elements(), found),
        "the result depends on what the workspace holds");
}

}  // namespace fuzz
