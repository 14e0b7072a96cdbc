#include "call.h"
#include "fuzz.h"
#include "linear.h"
#include "tables.h"
#include "tensor.h"

namespace fuzz {
namespace {

using OnehotCall = Call<nabla_fast_onehot_args>;

// Any rows of a table, or pieces of it as they are.
void draw_map(Random& random, List<int64_t>& map, int64_t rows) {
  const bool pieces = random.one_in(2);
  for (int64_t v = 0; v < map.columns(); ++v)
    map[v] = pieces && v > 0 && map[v - 1] + 1 < rows && !random.one_in(20)
                 ? map[v - 1] + 1
                 : random.between(0, rows - 1);
  map.seal();
}

// More rows than share a pass, at times.
struct OnehotSizes : Sizes {
  explicit OnehotSizes(Random& random) : Sizes(random) {
    if (random.one_in(40)) {
      rows = random.between(250, 330);
      vocab = random.size(80);
    }
  }
};

// Hidden states and a head, and tables with the cotangents of what they mix; some tables have rows
// in an order of their own, and a map.
struct Problem {
  Linear linear;
  std::vector<int64_t> widths;
  std::vector<std::unique_ptr<List<int64_t>>> maps;  // null: none
  std::vector<int64_t> rows_of_tables;
  Values gradients;  // of tables and cotangents
  MatrixList<nabla_fast_matrix> tables, cotangents;
  List<int64_t> table_rows;
  List<const int64_t*> token_maps;
  List<nabla_fast_status> status;

  explicit Problem(Random& random) : Problem(random, OnehotSizes(random), table_widths(random)) {}
  Problem(Random& random, const Sizes& sizes, const std::vector<int64_t>& of_tables)
      : linear(random, sizes.rows, sizes.vocab),
        widths(of_tables),
        rows_of_tables(draw_maps(random)),
        gradients(random),
        tables(random, gradients, rows_of_tables, widths, false),
        cotangents(random, gradients, sizes.rows, widths),
        table_rows(random, static_cast<int64_t>(widths.size())),
        token_maps(random, static_cast<int64_t>(widths.size())),
        status(random, sizes.rows) {}
  // Of how many rows each table is.
  std::vector<int64_t> draw_maps(Random& random) {
    std::vector<int64_t> rows;
    for (size_t t = 0; t < widths.size(); ++t) {
      const bool mapped = random.one_in(3);
      rows.push_back(mapped ? random.size(300) : linear.vocab);
      maps.push_back(mapped ? std::make_unique<List<int64_t>>(random, linear.vocab) : nullptr);
      if (mapped) draw_map(random, *maps.back(), rows.back());
    }
    return rows;
  }
  bool is_mapped() const {
    return std::any_of(maps.begin(), maps.end(), [](const auto& map) { return map != nullptr; });
  }
  // The row of a table that stands for a token.
  int64_t row_of(size_t t, int64_t v) const { return maps[t] ? (*maps[t])[v] : v; }

  void give(Random& random, OnehotCall& call) {
    nabla_fast_onehot_args& args = call.args;
    call.rows(args.rows, linear.rows);
    call.size(args.vocab, linear.vocab, 1);
    call.size(args.table_count, static_cast<int64_t>(widths.size()), 0);
    linear.give(call);
    tables.give(call, By::kOthers, args.tables);
    cotangents.give(call, By::kRows, args.cotangents);
    call.writes(By::kRows, args.row_status, status);
    args.nll_coeff = random.pick({1.0, 0.3, 0.0, -2.0, 1e30, 1e300});
    if (!is_mapped() && random.one_in(2)) {
      call.garbage(args.table_rows);
      return;
    }
    for (size_t t = 0; t < widths.size(); ++t) {
      const auto n = static_cast<int64_t>(t);
      // Without a map, nobody asks how many rows there are.
      table_rows[n] = maps[t] ? rows_of_tables[t] : random.negative();
      token_maps[n] = nullptr;
      if (maps[t]) give_map(random, call, t);
    }
    table_rows.seal();
    token_maps.seal();
    Array& list = call.reads(By::kOthers, args.token_maps, token_maps);
    list.may_be_null = list.stays = true;
    call.reads(By::kOthers, args.table_rows, table_rows).may_be_null = !is_mapped();
  }
  void give_map(Random& random, OnehotCall& call, size_t t) {
    const auto n = static_cast<int64_t>(t);
    List<int64_t>& map = *maps[t];
    call.reads(By::kOthers, token_maps[n], map).may_be_null = true;
    if (linear.rows == 0) return;
    call.any_mistake([&, n] { table_rows[n] = random.negative(); });
    call.mistake(NABLA_FAST_INVALID_TOKEN, [&, t] {
      map[random.between(0, linear.vocab - 1)] =
          random.pick<int64_t>({rows_of_tables[t], random.huge(), random.negative()});
    });
  }
};

// The tables of a call copied in the order of the tokens, while this lives.
struct Aligned {
  OnehotCall::Restored restored;
  std::vector<std::vector<char>> memory;

  Aligned(OnehotCall& call, Problem& problem) : restored(call) {
    for (size_t t = 0; t < problem.widths.size(); ++t) {
      nabla_fast_matrix& table = problem.tables.fields[static_cast<int64_t>(t)];
      const auto bytes =
          static_cast<size_t>(table.width * (table.dtype == NABLA_FAST_FLOAT32 ? 4 : 2));
      std::vector<char> rows(bytes * static_cast<size_t>(problem.linear.vocab));
      for (int64_t v = 0; v < problem.linear.vocab && bytes > 0; ++v)
        std::memcpy(rows.data() + static_cast<size_t>(v) * bytes,
                    problem.tables.matrices[t].row(problem.row_of(t, v)), bytes);
      memory.push_back(std::move(rows));
      table.data = memory.back().data();
      table.stride = table.width;
    }
    call.args.token_maps = nullptr;
    call.args.table_rows = nullptr;
  }
};

// A right call, or nothing where a wrong one was checked.
bool run(Random& random, Problem& problem, OnehotCall& call) {
  if (random.one_in(3)) {
    call.check_refused();
    return false;
  }
  const State before = call.state();
  check(call.run() == NABLA_FAST_OK, "right arguments are refused");
  const State after = call.state();
  call.check_inputs();
  if (problem.is_mapped()) {
    const Aligned aligned(call, problem);
    call.put(before);
    check(call.run() == NABLA_FAST_OK && call.same_state(call.state(), after),
          "a map is not what a table in the order of its tokens is");
  }
  call.check_again(before, after);
  call.check_interleaved(before, after);
  call.check_rows_alone(before, after, 1 + problem.linear.rows / 4);
  for (int64_t r = 0; r < problem.linear.rows; ++r)
    check(is_row_status(problem.status[r]), "a row's status");
  return true;
}

}  // namespace

FUZZ(onehot_grad) {
  Problem problem(random);
  const int64_t rows = problem.linear.rows, vocab = problem.linear.vocab;
  Tensor<float> grad(random, {rows}, vocab);
  List<float> norm(random, rows);
  OnehotCall call(random, nabla_fast_onehot_grad, nabla_fast_onehot_grad_workspace);
  call.garbage(call.args.norm);
  problem.give(random, call);
  call.writes(By::kRows, call.args.grad, grad);
  if (!run(random, problem, call)) return;

  // Norms are taken of other roundings of the same numbers.
  List<nabla_fast_status> statuses(random, rows);
  nabla_fast_onehot_args of_norm = call.args;
  of_norm.size = sizeof of_norm;
  of_norm.row_status = statuses.data();
  of_norm.norm = norm.data();
  Workspace workspace(random, nabla_fast_onehot_grad_norm_workspace(&of_norm), 0);
  of_norm.workspace = workspace.data();
  of_norm.workspace_bytes = nabla_fast_onehot_grad_norm_workspace(&of_norm);
  check(nabla_fast_onehot_grad_norm(&of_norm) == NABLA_FAST_OK, "a norm is refused");

  const double nu = call.args.nll_coeff;
  for (int64_t r = 0; r < rows; r += random.between(1, 1 + rows / 4)) {
    const nabla_fast_status status = problem.status[r];
    const float* g = grad.row(r);
    const Row row(problem.linear, r, 1.0);
    if (row.moderate()) {
      check(status == row.status(), "a row's status is not that of its logits");
      check(statuses[r] == status, "the status of a norm is not that of its row");
    }
    if (status != NABLA_FAST_OK) {
      for (int64_t v = 0; v < vocab; ++v) check(std::isnan(g[v]), "an answer to a bad row");
      continue;
    }
    if (!row.moderate() || std::fabs(nu) > 1e3) continue;
    double squares = 0;
    for (int64_t v = 0; v < vocab; ++v) {
      squares += double{g[v]} * g[v];
      const double z = row.z[static_cast<size_t>(v)];
      if (z == -HUGE_VAL) {
        check(g[v] == 0, "the gradient of a masked token");
        continue;
      }
      Sum sum;
      for (size_t t = 0; t < problem.widths.size(); ++t)
        sum.add(problem.cotangents.matrices[t], r, problem.tables.matrices[t],
                problem.row_of(t, v));
      const double size = sum.size + std::fabs(nu) * (row.size + 1 + std::fabs(row.logsumexp));
      if (size < 1e30)
        check(std::fabs(g[v] - (sum.value - nu * (z - row.logsumexp))) <= kNear * size + kTiny,
              "a gradient is far from what it is in double");
    }
    if (squares < 1e36)
      check(std::fabs(norm[r] - std::sqrt(squares)) <=
                1e-4 * (std::sqrt(squares) + std::fabs(nu) * (row.size + 1)) + kTiny,
            "a norm is not that of the gradient");
  }
}

FUZZ(onehot_grad_norm) {
  Problem problem(random);
  List<float> norm(random, problem.linear.rows);
  OnehotCall call(random, nabla_fast_onehot_grad_norm, nabla_fast_onehot_grad_norm_workspace);
  call.garbage(call.args.grad);
  problem.give(random, call);
  call.writes(By::kRows, call.args.norm, norm);
  if (!run(random, problem, call)) return;
  for (int64_t r = 0; r < problem.linear.rows; ++r) {
    check(problem.status[r] == NABLA_FAST_OK || std::isnan(norm[r]), "an answer to a bad row");
    check(!(norm[r] < 0), "a norm below 0");
  }
}

}  // namespace fuzz
