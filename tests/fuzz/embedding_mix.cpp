#include "call.h"
#include "fuzz.h"
#include "linear.h"
#include "tables.h"
#include "tensor.h"

namespace fuzz {
namespace {

using MixCall = Call<nabla_fast_mix_args>;

// What both functions are given.
struct Problem {
  int64_t rows, vocab;
  bool linear;
  std::vector<Matrix> inputs;  // logits, or hidden and head
  std::vector<int64_t> widths;
  Values gradients;  // of tables and cotangents
  MatrixList<nabla_fast_matrix> tables;
  List<int64_t> seed, position;
  List<nabla_fast_status> status;
  List<float> perturbed;

  explicit Problem(Random& random) : Problem(random, Sizes(random), table_widths(random)) {}
  Problem(Random& random, const Sizes& sizes, const std::vector<int64_t>& of_tables)
      : rows(sizes.rows),
        vocab(sizes.vocab),
        linear(random.one_in(2)),
        widths(of_tables),
        gradients(random),
        tables(random, gradients, sizes.vocab, of_tables),
        seed(random, rows),
        position(random, rows),
        status(random, rows),
        perturbed(random, vocab * ((rows + 15) / 16 * 16)) {
    Values values(random);
    if (linear) {
      const int64_t width = random.between(1, 100);
      inputs.emplace_back(random, rows, width, dtype(random));
      inputs.emplace_back(random, vocab, width, dtype(random));
      for (Matrix& matrix : inputs) matrix.plain(values);
    } else {
      inputs.emplace_back(random, rows, vocab, dtype(random));
      inputs[0].logits(values);
    }
  }
  void give(Random& random, MixCall& call) {
    nabla_fast_mix_args& args = call.args;
    call.rows(args.rows, rows);
    call.size(args.vocab, vocab, 1);
    call.tau(random.pick({1.0, 0.7, 10.0, 0.05}));
    call.size(args.table_count, static_cast<int64_t>(widths.size()), 0);
    tables.give(call, By::kOthers, args.tables);
    if (linear) {
      call.reads(By::kRows, args.hidden, inputs[0]);
      call.reads(By::kOthers, args.head, inputs[1]);
      // What is not there is not looked at.
      call.garbage(args.logits);
      args.logits.data = nullptr;
    } else {
      call.garbage(args.perturbed);
      call.reads(By::kRows, args.logits, inputs[0]);
    }
    if (random.one_in(3)) {
      call.reads(By::kRows, args.noise_seed, seed);
      call.reads(By::kRows, args.noise_position, position);
    } else {
      call.mistake(NABLA_FAST_INVALID_POINTER, [&] {
        const bool which = random.one_in(2);
        args.noise_seed = which ? seed.data() : nullptr;
        args.noise_position = which ? nullptr : position.data();
      });
    }
    call.writes(By::kRows, args.row_status, status);
  }
  void check_statuses() {
    for (int64_t r = 0; r < rows; ++r) {
      check(is_row_status(status[r]), "a row's status");
      if (!linear)
        check(status[r] == inputs[0].status(r), "a row's status is not that of its logits");
    }
  }
};

void run(Random& random, Problem& problem, MixCall& call, bool rows_alone = true) {
  if (random.one_in(3)) return call.check_refused();
  const State before = call.state();
  check(call.run() == NABLA_FAST_OK, "right arguments are refused");
  const State after = call.state();
  call.check_inputs();
  problem.check_statuses();
  call.check_again(before, after);
  call.check_interleaved(before, after);
  if (rows_alone) call.check_rows_alone(before, after, 1 + problem.rows / 4);
}

}  // namespace

FUZZ(embedding_mix) {
  Problem problem(random);
  MatrixList<nabla_fast_output> mixes(random, problem.gradients, problem.rows, problem.widths,
                                      true);
  MixCall call(random, nabla_fast_embedding_mix, nabla_fast_embedding_mix_workspace);
  call.garbage(call.args.cotangents);
  call.garbage(call.args.direct);
  call.garbage(call.args.grad);
  call.args.hard = random.one_in(2) ? random.pick({1, -1, INT32_MIN}) : 0;
  problem.give(random, call);
  mixes.give(call, By::kRows, call.args.mixes);
  // Not among the arrays that are looked at: one row has another place in it than among others.
  if (problem.linear && random.one_in(2)) call.args.perturbed = problem.perturbed.data();
  run(random, problem, call);
}

FUZZ(embedding_mix_backward) {
  Problem problem(random);
  const int64_t width = problem.inputs.back().tensor().columns();
  MatrixList<nabla_fast_matrix> cotangents(random, problem.gradients, problem.rows, problem.widths);
  Matrix grad(random, problem.rows, width,
              problem.linear ? NABLA_FAST_FLOAT32 : problem.inputs[0].dtype());
  Matrix direct(random, problem.rows, problem.vocab, dtype(random));
  direct.plain(problem.gradients);
  MixCall call(random, nabla_fast_embedding_mix_backward,
               nabla_fast_embedding_mix_backward_workspace);
  call.garbage(call.args.hard);
  call.garbage(call.args.mixes);
  problem.give(random, call);
  cotangents.give(call, By::kRows, call.args.cotangents);
  if (random.one_in(2)) {
    call.reads(By::kRows, call.args.direct, direct).may_be_null = true;
  } else {
    call.garbage(call.args.direct);
    call.args.direct.data = nullptr;
  }
  call.writes(By::kRows, call.args.grad, grad.tensor());
  const bool kept = problem.linear && random.one_in(2);
  if (kept) call.reads(By::kOthers, call.args.perturbed, problem.perturbed).may_be_null = true;
  run(random, problem, call, !kept);
}

}  // namespace fuzz
