#include "fuzz.h"
#include "matrix.h"

namespace fuzz {
namespace {

// Hidden states and a head, and tables with the cotangents of what they mix; some tables have rows
// in an order of their own, and a map.
struct Problem {
  int64_t rows, vocab;
  std::vector<Matrix> linear;  // hidden and head
  std::vector<Matrix> tables, cotangents;
  std::vector<nabla_fast_table> of_tables, of_cotangents;
  std::vector<std::vector<int64_t>> maps;  // empty: none
  std::vector<const int64_t*> of_maps;
  std::vector<int64_t> table_rows;
  nabla_fast_onehot call{};

  explicit Problem(Random& random) {
    rows = random.one_in(12) ? random.between(60, 140) : random.between(0, 9);
    vocab = random.one_in(15) ? random.between(2000, 5000) : random.size(700);
    // More rows than share a pass.
    if (random.one_in(40)) rows = random.between(250, 330), vocab = random.size(80);
    Values values(random), gradients(random);
    const int64_t width = random.one_in(15) ? 0 : random.between(1, 100);
    linear.emplace_back(random, rows, width, dtype(random));
    linear.emplace_back(random, vocab, width, dtype(random));
    linear[0].plain(values);
    const bool strange = width > 0 && random.one_in(5);
    linear[1].with([&](auto& tensor) {
      tensor.each_row([&](auto* row) {
        values.fill_plain(row, width);
        if (strange && random.one_in(2))
          Values::set(row[random.between(0, width - 1)],
                      random.pick({kNaN, kInfinity, -kInfinity, -kInfinity}));
      });
    });
    const int64_t count = random.between(0, 3);
    for (int64_t t = 0; t < count; ++t) {
      const int64_t columns = random.one_in(15) ? 0 : random.between(1, 150);
      const bool mapped = random.one_in(3);
      table_rows.push_back(mapped ? random.size(300) : vocab);
      maps.push_back(mapped ? draw_map(random, vocab, table_rows.back()) : std::vector<int64_t>());
      tables.emplace_back(random, table_rows.back(), columns, dtype(random));
      tables.back().plain(gradients);
      cotangents.emplace_back(random, rows, columns, dtype(random));
      cotangents.back().plain(gradients);
    }
    for (Matrix& table : tables) of_tables.push_back(table.table());
    for (Matrix& cotangent : cotangents) of_cotangents.push_back(cotangent.table());
    for (const auto& map : maps) of_maps.push_back(map.empty() ? nullptr : map.data());
    call.rows = rows;
    call.vocab = vocab;
    call.hidden = linear[0].table();
    call.head = linear[1].table();
    call.table_count = count;
    call.tables = of_tables.data();
    call.cotangents = of_cotangents.data();
    if (is_mapped() || random.one_in(2)) {
      call.token_maps = of_maps.data();
      call.table_rows = table_rows.data();
    }
    call.nll_coeff = random.pick({1.0, 0.3, 0.0, -2.0, 1e30, 1e300});
    // A stride over nothing may be any.
    const int64_t any = random.pick<int64_t>({random.huge(), INT64_MIN, 0});
    if (rows <= 1 && random.one_in(4)) call.hidden.stride = any;
    if (vocab == 1 && random.one_in(2)) call.head.stride = any;
    if (count > 0 && table_rows[0] == 1 && random.one_in(2)) of_tables[0].stride = any;
  }
  // Any rows, or pieces of the table as they are.
  static std::vector<int64_t> draw_map(Random& random, int64_t vocab, int64_t rows) {
    std::vector<int64_t> map;
    const bool pieces = random.one_in(2);
    for (int64_t v = 0; v < vocab; ++v)
      map.push_back(pieces && v > 0 && map.back() + 1 < rows && !random.one_in(20)
                        ? map.back() + 1
                        : random.between(0, rows - 1));
    return map;
  }
  bool is_mapped() const {
    return std::any_of(maps.begin(), maps.end(), [](const auto& map) { return !map.empty(); });
  }
  // The row of a table that stands for a token.
  int64_t row_of(size_t t, int64_t v) const {
    return maps[t].empty() ? v : maps[t][static_cast<size_t>(v)];
  }
  bool untouched() {
    bool same = true;
    for (auto* matrices : {&linear, &tables, &cotangents})
      for (Matrix& matrix : *matrices) same = matrix.untouched() && same;
    return same;
  }
  // The inputs of one row.
  nabla_fast_onehot of_row(int64_t r, std::vector<nabla_fast_table>& row_cotangents) {
    nabla_fast_onehot single = call;
    single.rows = 1;
    single.hidden.data = linear[0].row(r);
    row_cotangents = of_cotangents;
    for (size_t t = 0; t < cotangents.size(); ++t) row_cotangents[t].data = cotangents[t].row(r);
    single.cotangents = row_cotangents.data();
    return single;
  }
};

// The same inputs, every table copied in the order of the tokens.
struct Aligned {
  std::vector<std::vector<char>> memory;
  std::vector<nabla_fast_table> tables;
  nabla_fast_onehot call;

  explicit Aligned(Problem& problem) : call(problem.call) {
    for (size_t t = 0; t < problem.tables.size(); ++t) {
      nabla_fast_table table = problem.of_tables[t];
      const auto bytes =
          static_cast<size_t>(table.width * (table.dtype == NABLA_FAST_FLOAT32 ? 4 : 2));
      std::vector<char> rows(bytes * static_cast<size_t>(problem.vocab));
      for (int64_t v = 0; v < problem.vocab && bytes > 0; ++v)
        std::memcpy(rows.data() + static_cast<size_t>(v) * bytes,
                    problem.tables[t].row(problem.row_of(t, v)), bytes);
      memory.push_back(std::move(rows));
      table.data = memory.back().data();
      table.stride = table.width;
      tables.push_back(table);
    }
    call.tables = tables.data();
    call.token_maps = nullptr;
    call.table_rows = nullptr;
  }
};

// One thing wrong with hidden states and head, or with the tables.
void spoil(Random& random, Problem& problem, bool with_tables) {
  nabla_fast_onehot& call = problem.call;
  if (with_tables && problem.is_mapped() && problem.rows > 0 && random.one_in(3)) {
    if (random.one_in(4)) {
      call.table_rows = nullptr;
      return;
    }
    size_t t = 0;
    while (problem.maps[t].empty()) ++t;
    const int64_t rows = problem.table_rows[t], last = problem.vocab - 1;
    if (random.one_in(4))
      problem.table_rows[t] = random.negative();
    else
      problem.maps[t][static_cast<size_t>(random.between(0, last))] =
          random.pick<int64_t>({rows, random.huge(), random.negative()});
    return;
  }
  switch (random.between(0, with_tables ? 15 : 9)) {
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
      (random.one_in(2) ? call.hidden : call.head).dtype =
          random.pick<nabla_fast_dtype>({-1, 2, INT32_MAX, INT32_MIN});
      break;
    case 5:
      (random.one_in(2) ? call.hidden : call.head).width =
          random.pick<int64_t>({random.negative(), random.huge(), 101});
      break;
    case 6:
      call.hidden.width = call.head.width =
          random.pick<int64_t>({random.negative(), random.huge()});
      break;
    case 7:
      // No matrix without columns needs an address.
      if (call.head.width > 0)
        (random.one_in(2) ? call.hidden : call.head).data = nullptr;
      else
        call.rows = -1;
      break;
    case 8:
      if (call.vocab > 1 && call.head.width > 0)
        call.head.stride = random.pick<int64_t>({random.huge(), INT64_MIN});
      else
        call.vocab = 0;
      break;
    case 9:
      if (call.rows > 1 && call.head.width > 0)
        call.hidden.stride = random.pick<int64_t>({random.huge(), INT64_MIN});
      else
        call.vocab = 0;
      break;
    case 10:
      call.table_count = random.negative();
      break;
    case 11:
      call.table_count = random.huge();
      break;
    case 12:
      call.table_count = std::max<int64_t>(call.table_count, 1);
      (random.one_in(2) ? call.tables : call.cotangents) = nullptr;
      break;
    default:
      if (problem.of_tables.empty()) {
        call.rows = -1;
      } else {
        const size_t t = problem.of_tables.size() - 1;
        nabla_fast_table& table =
            random.one_in(2) ? problem.of_tables[t] : problem.of_cotangents[t];
        switch (random.between(0, 2)) {
          case 0:
            if (table.width > 0)
              table.data = nullptr;
            else
              table.dtype = -1;
            break;
          case 1:
            table.dtype = random.pick<nabla_fast_dtype>({-1, 2, INT32_MAX, INT32_MIN});
            break;
          default:
            table.width = random.pick<int64_t>({random.negative(), random.huge(), 151});
            break;
        }
      }
  }
}

// A sum of products in double, and that of the sizes of finite ones.
struct Sum {
  double value = 0, size = 0;
  // Whether it has an infinite product of a number that units for bf16 take for 0.
  bool flushed = false;

  void add(Matrix& a, int64_t row, Matrix& b, int64_t token) {
    a.with([&](auto& left) {
      b.with([&](auto& right) {
        const auto *x = left.row(row), *y = right.row(token);
        for (int64_t k = 0; k < left.columns(); ++k) {
          const double product = double{Values::wide(x[k])} * double{Values::wide(y[k])};
          value += product;
          if (std::isfinite(product)) size += std::fabs(product);
          flushed |= std::isinf(product) &&
                     std::min(std::fabs(Values::wide(x[k])), std::fabs(Values::wide(y[k]))) <
                         std::numeric_limits<float>::min();
        }
      });
    });
  }
};

// A row in double.
struct Row {
  std::vector<double> z;
  double size = 0;  // of the products of any of its logits
  double logsumexp = 0, top = -HUGE_VAL;
  bool nan = false, infinite = false, flushed = false;

  Row(Problem& problem, int64_t r, double tau) {
    for (int64_t v = 0; v < problem.vocab; ++v) {
      Sum sum;
      sum.add(problem.linear[0], r, problem.linear[1], v);
      z.push_back(sum.value);
      nan |= std::isnan(sum.value);
      flushed |= sum.flushed;
      infinite |= sum.value == HUGE_VAL;
      size = std::max(size, sum.size);
      top = std::max(top, sum.value);
    }
    double of_exps = 0;
    for (const double value : z) of_exps += std::exp((value - top) / tau);
    logsumexp = top / tau + std::log(of_exps);
  }
  nabla_fast_status status() const {
    return nan                ? NABLA_FAST_ROW_NAN
           : infinite         ? NABLA_FAST_ROW_INFINITE
           : top == -HUGE_VAL ? NABLA_FAST_ROW_ALL_MASKED
                              : NABLA_FAST_OK;
  }
};

constexpr double kNear = 2e-5;
// Sums of what fp32 takes for 0.
constexpr double kTiny = 1e-35;

bool is_row_status(nabla_fast_status status) {
  return status >= NABLA_FAST_OK && status <= NABLA_FAST_ROW_ALL_MASKED;
}

// Runs of a function, with a workspace to the byte.
template <typename Bytes, typename Function>
nabla_fast_status run(Random& random, int fill, int64_t short_by, const Bytes& bytes_of,
                      const Function& function) {
  const int64_t bytes = bytes_of();
  check(bytes >= 0, "a size is negative");
  const int64_t size = std::max<int64_t>(std::min<int64_t>(bytes, 1 << 28) - short_by, 0);
  Workspace workspace(random, size, fill);
  return function(workspace.data(), size);
}

}  // namespace

FUZZ(linear_token_stats) {
  Problem problem(random);
  const int64_t rows = problem.rows;
  double tau = random.tau();
  struct Statistics {
    Memory<float> logsumexp, confidence, entropy;
    Memory<int64_t> argmax;
    Memory<nabla_fast_status> status;

    Statistics(Random& random, int64_t rows)
        : logsumexp(random, rows),
          confidence(random, rows),
          entropy(random, rows),
          argmax(random, rows),
          status(random, rows) {}
    bool operator==(const Statistics& other) const {
      return same(logsumexp, other.logsumexp) && same(confidence, other.confidence) &&
             same(entropy, other.entropy) && same(argmax, other.argmax) &&
             same(status, other.status);
    }
  };
  Statistics found(random, rows);
  int missing = 0;  // which pointer is null
  const auto call = [&](const nabla_fast_onehot& of, Statistics& into, int fill, int64_t short_by,
                        int32_t threads) {
    const auto bytes = [&] {
      return nabla_fast_linear_token_stats_workspace(&of.hidden, of.rows, &of.head, of.vocab);
    };
    return run(random, fill, short_by, bytes, [&](void* workspace, int64_t size) {
      return nabla_fast_linear_token_stats(&of.hidden, of.rows, &of.head, of.vocab, tau,
                                           missing == 1 ? nullptr : into.logsumexp.data(),
                                           missing == 2 ? nullptr : into.confidence.data(),
                                           missing == 3 ? nullptr : into.entropy.data(),
                                           missing == 4 ? nullptr : into.argmax.data(),
                                           missing == 5 ? nullptr : into.status.data(),
                                           missing == 6 ? nullptr : workspace, size, threads);
    });
  };
  if (random.one_in(3)) {
    const Statistics before = found;
    int64_t small = 0;
    switch (random.between(0, 5)) {
      case 0:
        small = 1;
        break;
      case 1:
        tau = random.wrong_tau();
        break;
      case 2:
        missing = static_cast<int>(random.between(1, 6));
        break;
      default:
        spoil(random, problem, false);
        break;
    }
    const nabla_fast_status refused = call(problem.call, found, 0xAA, small, random.threads());
    check(refuses(refused) || (rows == 0 && refused == NABLA_FAST_OK),
          "wrong arguments are accepted");
    check(found == before && problem.untouched(), "a refused call has written");
    return;
  }
  check(call(problem.call, found, 0xFF, 0, random.threads()) == NABLA_FAST_OK,
        "right arguments are refused");
  check(problem.untouched(), "inputs have changed");
  Statistics again(random, rows);
  check(call(problem.call, again, 0, 0, random.threads()) == NABLA_FAST_OK && again == found,
        "the result depends on the threads or on what the workspace holds");
  for (int64_t r = 0; r < rows; r += random.between(1, 1 + rows / 4)) {
    check(is_row_status(found.status[r]), "a row's status");
    Statistics alone(random, 1);
    std::vector<nabla_fast_table> unused;
    check(call(problem.of_row(r, unused), alone, 0x55, 0, 1) == NABLA_FAST_OK,
          "a row alone is refused");
    check(same(alone.logsumexp.data(), &found.logsumexp[r], 1) &&
              same(alone.confidence.data(), &found.confidence[r], 1) &&
              same(alone.entropy.data(), &found.entropy[r], 1) &&
              alone.argmax[0] == found.argmax[r] && alone.status[0] == found.status[r],
          "a row's result depends on the others");
    const Row row(problem, r, tau);
    // Beyond, fp32 has infinities of its own.
    const bool moderate = row.size < 1e30 && !row.flushed;
    if (moderate)
      check(found.status[r] == row.status(), "a row's status is not that of its logits");
    if (found.status[r] != NABLA_FAST_OK) {
      check(std::isnan(found.logsumexp[r]) && std::isnan(found.confidence[r]) &&
                std::isnan(found.entropy[r]) && found.argmax[r] == -1,
            "a row without an answer has one");
      continue;
    }
    check(found.argmax[r] >= 0 && found.argmax[r] < problem.vocab, "argmax is no token");
    check(found.confidence[r] > 0 && found.confidence[r] <= 1, "confidence");
    check(found.entropy[r] > -1e-5 && found.entropy[r] < std::log(problem.vocab) * 1.00001 + 1e-5,
          "entropy");
    if (!moderate) continue;
    check(row.z[static_cast<size_t>(found.argmax[r])] >= row.top - kNear * row.size - kTiny,
          "argmax");
    const double scale = row.size / tau + 1 + std::fabs(row.logsumexp);
    if (scale < 1e30)
      check(std::fabs(found.logsumexp[r] - row.logsumexp) <= kNear * scale,
            "logsumexp is far from what it is in double");
  }
}

FUZZ(onehot_grad) {
  Problem problem(random);
  const int64_t rows = problem.rows, vocab = problem.vocab;
  Tensor<float> grad(random, {rows}, vocab);
  Memory<nabla_fast_status> status(random, rows), row_status(random, 1);
  Memory<float> norm(random, 1);
  bool no_workspace = false;
  const auto call = [&](const nabla_fast_onehot& of, float* into, int64_t stride,
                        nabla_fast_status* statuses, int fill, int64_t short_by, int32_t threads) {
    return run(
        random, fill, short_by, [&] { return nabla_fast_onehot_grad_workspace(&of); },
        [&](void* workspace, int64_t size) {
          return nabla_fast_onehot_grad(&of, into, stride, statuses,
                                        no_workspace ? nullptr : workspace, size, threads);
        });
  };
  if (random.one_in(3)) {
    const auto before = status;
    float* into = grad.data();
    nabla_fast_status* statuses = status.data();
    int64_t stride = grad.stride(0), small = 0;
    switch (random.between(0, 8)) {
      case 0:
        small = 1;
        break;
      case 1:
        into = nullptr;
        break;
      case 2:
        statuses = nullptr;
        break;
      case 3:
        no_workspace = true;
        break;
      case 4:
        if (rows > 1)
          stride = random.pick<int64_t>({random.huge(), INT64_MIN});
        else
          into = nullptr;
        break;
      default:
        spoil(random, problem, true);
        break;
    }
    const nabla_fast_status refused =
        call(problem.call, into, stride, statuses, 0xAA, small, random.threads());
    check(refuses(refused) || (rows == 0 && refused == NABLA_FAST_OK),
          "wrong arguments are accepted");
    check(grad.untouched() && same(status, before) && problem.untouched(),
          "a refused call has written");
    return;
  }
  check(call(problem.call, grad.data(), grad.stride(0), status.data(), 0xFF, 0, random.threads()) ==
            NABLA_FAST_OK,
        "right arguments are refused");
  check(problem.untouched(), "inputs have changed");
  const auto found = grad.elements();
  const auto statuses = status;
  if (problem.is_mapped()) {
    const Aligned aligned(problem);
    check(call(aligned.call, grad.data(), grad.stride(0), status.data(), 0x33, 0,
               random.threads()) == NABLA_FAST_OK &&
              same(grad.elements(), found) && same(status, statuses),
          "a map is not what a table in the order of its tokens is");
  }
  check(call(problem.call, grad.data(), grad.stride(0), status.data(), 0, 0, random.threads()) ==
                NABLA_FAST_OK &&
            same(grad.elements(), found) && same(status, statuses),
        "the result depends on the threads or on what the workspace holds");
  for (int64_t r = 0; r < rows; r += random.between(1, 1 + rows / 4)) {
    check(is_row_status(status[r]), "a row's status");
    Tensor<float> alone(random, {1}, vocab);
    std::vector<nabla_fast_table> row_cotangents;
    const nabla_fast_onehot single = problem.of_row(r, row_cotangents);
    const int64_t any = random.pick<int64_t>({vocab, random.huge(), INT64_MIN});
    check(call(single, alone.data(), any, row_status.data(), 0x55, 0, 1) == NABLA_FAST_OK,
          "a row alone is refused");
    const float* g = grad.row(r);
    check(same(alone.row(0), g, vocab) && row_status[0] == status[r],
          "a row's result depends on the others");
    const Row row(problem, r, 1.0);
    const bool moderate = row.size < 1e30 && !row.flushed;
    if (moderate) check(status[r] == row.status(), "a row's status is not that of its logits");
    if (status[r] != NABLA_FAST_OK) {
      for (int64_t v = 0; v < vocab; ++v) check(std::isnan(g[v]), "an answer to a bad row");
      continue;
    }
    const double nu = problem.call.nll_coeff;
    if (!moderate || std::fabs(nu) > 1e3) continue;
    double squares = 0;
    for (int64_t v = 0; v < vocab; ++v) {
      squares += double{g[v]} * g[v];
      const double z = row.z[static_cast<size_t>(v)];
      if (z == -HUGE_VAL) {
        check(g[v] == 0, "the gradient of a masked token");
        continue;
      }
      Sum sum;
      for (size_t t = 0; t < problem.tables.size(); ++t)
        sum.add(problem.cotangents[t], r, problem.tables[t], problem.row_of(t, v));
      const double size = sum.size + std::fabs(nu) * (row.size + 1 + std::fabs(row.logsumexp));
      if (size < 1e30)
        check(std::fabs(g[v] - (sum.value - nu * (z - row.logsumexp))) <= kNear * size + kTiny,
              "a gradient is far from what it is in double");
    }
    // Norms are taken of other roundings of the same numbers.
    const auto norm_of = [&](void* workspace, int64_t size) {
      return nabla_fast_onehot_grad_norm(&single, norm.data(), row_status.data(), workspace, size,
                                         1);
    };
    check(run(
              random, 0, 0, [&] { return nabla_fast_onehot_grad_norm_workspace(&single); },
              norm_of) == NABLA_FAST_OK,
          "a norm is refused");
    if (squares < 1e36)
      check(std::fabs(norm[0] - std::sqrt(squares)) <=
                1e-4 * (std::sqrt(squares) + std::fabs(nu) * (row.size + 1)) + kTiny,
            "a norm is not that of the gradient");
  }
}

FUZZ(onehot_grad_norm) {
  Problem problem(random);
  const int64_t rows = problem.rows;
  Memory<float> norm(random, rows), alone(random, 1);
  Memory<nabla_fast_status> status(random, rows), row_status(random, 1);
  bool no_workspace = false;
  const auto call = [&](const nabla_fast_onehot& of, float* into, nabla_fast_status* statuses,
                        int fill, int64_t short_by, int32_t threads) {
    return run(
        random, fill, short_by, [&] { return nabla_fast_onehot_grad_norm_workspace(&of); },
        [&](void* workspace, int64_t size) {
          return nabla_fast_onehot_grad_norm(&of, into, statuses,
                                             no_workspace ? nullptr : workspace, size, threads);
        });
  };
  if (random.one_in(3)) {
    const auto norm_before = norm;
    const auto before = status;
    float* into = norm.data();
    nabla_fast_status* statuses = status.data();
    int64_t small = 0;
    switch (random.between(0, 7)) {
      case 0:
        small = 1;
        break;
      case 1:
        into = nullptr;
        break;
      case 2:
        statuses = nullptr;
        break;
      case 3:
        no_workspace = true;
        break;
      default:
        spoil(random, problem, true);
        break;
    }
    const nabla_fast_status refused =
        call(problem.call, into, statuses, 0xAA, small, random.threads());
    check(refuses(refused) || (rows == 0 && refused == NABLA_FAST_OK),
          "wrong arguments are accepted");
    check(same(norm, norm_before) && same(status, before) && problem.untouched(),
          "a refused call has written");
    return;
  }
  check(call(problem.call, norm.data(), status.data(), 0xFF, 0, random.threads()) == NABLA_FAST_OK,
        "right arguments are refused");
  check(problem.untouched(), "inputs have changed");
  const auto found = norm;
  const auto statuses = status;
  if (problem.is_mapped()) {
    const Aligned aligned(problem);
    check(call(aligned.call, norm.data(), status.data(), 0x33, 0, random.threads()) ==
                  NABLA_FAST_OK &&
              same(norm, found) && same(status, statuses),
          "a map is not what a table in the order of its tokens is");
  }
  check(call(problem.call, norm.data(), status.data(), 0, 0, random.threads()) == NABLA_FAST_OK &&
            same(norm, found) && same(status, statuses),
        "the result depends on the threads or on what the workspace holds");
  for (int64_t r = 0; r < rows; r += random.between(1, 1 + rows / 4)) {
    check(is_row_status(status[r]), "a row's status");
    check(status[r] == NABLA_FAST_OK || std::isnan(norm[r]), "an answer to a bad row");
    check(!(norm[r] < 0), "a norm below 0");
    std::vector<nabla_fast_table> row_cotangents;
    check(call(problem.of_row(r, row_cotangents), alone.data(), row_status.data(), 0x55, 0, 1) ==
              NABLA_FAST_OK,
          "a row alone is refused");
    check(same(alone.data(), &norm[r], 1) && row_status[0] == status[r],
          "a row's result depends on the others");
  }
}

}  // namespace fuzz
