#include "call.h"
#include "fuzz.h"
#include "tensor.h"

namespace fuzz {
namespace {

using AttentionCall = Call<nabla_fast_attention_args>;

struct Problem {
  int64_t batch, group, kv_heads, suffix, dim, block_size, width, blocks;
  Tensor<float> q, k, v, key_pool, value_pool;
  Tensor<int64_t> tables;
  List<int64_t> lengths;
  bool strange;  // whether inputs hold NaN and infinities

  static Problem draw(Random& random) {
    // One after the other: arguments of a call are drawn in no particular order.
    const int64_t any = random.between(1, 200), batch = random.between(0, 3);
    const int64_t dim = random.pick<int64_t>({1, 3, 8, 16, 20, 32, 64, 80, 128, 512, any});
    const int64_t suffix = random.one_in(12) ? random.between(1, 90) : random.between(0, 9);
    const int64_t group = random.between(0, 4), kv_heads = random.between(1, 3);
    const int64_t block_size = random.pick<int64_t>({1, 3, 16, 64}), width = random.between(0, 6);
    return Problem(random, batch, group, kv_heads, suffix, dim, block_size, width);
  }
  Problem(Random& random, int64_t b, int64_t g, int64_t h, int64_t s, int64_t d, int64_t size,
          int64_t w)
      : batch(b),
        group(g),
        kv_heads(h),
        suffix(s),
        dim(d),
        block_size(size),
        width(w),
        blocks(random.between(1, 8)),
        q(random, {b, g * h, s}, d),
        k(random, {b, h, s}, d),
        v(random, {b, h, s}, d),
        key_pool(random, {blocks, size, h}, d),
        value_pool(random, {blocks, size, h}, d),
        tables(random, {b}, w),
        lengths(random, b),
        strange(random.one_in(10)) {
    Values values(random);
    for (Tensor<float>* tensor : {&q, &k, &v, &key_pool, &value_pool})
      fill(random, values, *tensor);
    for (int64_t n = 0; n < b; ++n) lengths[n] = random.between(0, w * size);
    lengths.seal();
    int64_t n = 0;
    tables.each_row([&](int64_t* row) {
      // Behind a prefix stands what nobody may follow.
      for (int64_t i = 0; i < w; ++i)
        row[i] = i * size < lengths[n] ? random.between(0, blocks - 1)
                                       : random.pick<int64_t>({INT64_MIN, INT64_MAX, -1, blocks});
      ++n;
    });
  }
  void fill(Random& random, Values& values, Tensor<float>& tensor) const {
    tensor.each_row([&](float* row) {
      values.fill_plain(row, dim);
      if (strange && random.one_in(20))
        row[random.between(0, dim - 1)] = random.pick({kNaN, kInfinity, -kInfinity});
    });
  }
  // [batch, heads, suffix, dim].
  std::vector<int64_t> queries() const { return {batch, group * kv_heads, suffix}; }
  std::vector<int64_t> keys() const { return {batch, kv_heads, suffix}; }

  void give(Random& random, AttentionCall& call) {
    nabla_fast_attention_args& args = call.args;
    call.rows(args.batch, batch);
    call.nothing = batch == 0 || group == 0 || suffix == 0;
    call.size(args.heads, group * kv_heads, 0);
    call.size(args.kv_heads, kv_heads, 1);
    call.size(args.suffix, suffix, 0);
    call.size(args.dim, dim, 1);
    call.size(args.blocks, blocks, 0);
    call.size(args.block_size, block_size, 1);
    call.size(args.table_width, width, 0);
    args.window = random.one_in(2) ? 0 : random.pick<int64_t>({1, 2, 7, 64, INT64_MAX});
    args.scale = random.pick({1.0, 0.125, 0.0, -1.0});
    call.reads(By::kRows, args.q, q);
    call.reads(By::kRows, args.k, k);
    call.reads(By::kRows, args.v, v);
    const bool prefix = batch > 0 && *std::max_element(lengths.data(), lengths.data() + batch) > 0;
    for (Array* array : {&call.reads(By::kOthers, args.key_pool, key_pool),
                         &call.reads(By::kOthers, args.value_pool, value_pool),
                         &call.reads(By::kRows, args.block_tables, tables, {&args.table_stride})}) {
      array->may_be_null = !prefix;
      if (!prefix && random.one_in(2)) array->put_address(0);
    }
    call.reads(By::kRows, args.prefix_lengths, lengths);
    give_mistakes(random, call);
  }
  void give_mistakes(Random& random, AttentionCall& call) {
    nabla_fast_attention_args& args = call.args;
    call.any_mistake([&] { args.dim = NABLA_FAST_MOST_HEAD_DIM + 1; });
    call.any_mistake([&] { args.window = random.negative(); });
    call.mistake(NABLA_FAST_INVALID_HEADS, [&] {
      args.kv_heads = kv_heads + (kv_heads == 1);
      args.heads = args.kv_heads * group + 1;
    });
    if (batch == 0) return;
    // A prefix that is too long for its table, or has no length.
    call.mistake(NABLA_FAST_INVALID_PREFIX, [&] {
      lengths[random.between(0, batch - 1)] =
          random.pick<int64_t>({-1, INT64_MIN, INT64_MAX, width * block_size + 1});
    });
    if (width == 0) return;
    // A block that is not in the pool, within a prefix; without one the pool may be null.
    const bool pool = args.key_pool.data && args.value_pool.data && args.block_tables;
    call.mistake(pool ? NABLA_FAST_INVALID_PREFIX : NABLA_FAST_INVALID_POINTER, [&] {
      const int64_t b = random.between(0, batch - 1);
      lengths[b] = width * block_size;
      tables.row(b)[random.between(0, width - 1)] =
          random.pick<int64_t>({-1, blocks, INT64_MIN, INT64_MAX});
    });
  }
};

// The first result of a query of a sequence, and its logsumexp, in double.
struct Expected {
  double output, logsumexp;
};
Expected expected(Problem& problem, const nabla_fast_attention_args& in, int64_t b, int64_t head,
                  int64_t s) {
  const int64_t kv = head / problem.group, prefix = problem.lengths[b], position = prefix + s;
  const int64_t first =
      in.window > 0 && in.window <= position ? position - in.window + 1 : int64_t{0};
  const auto token = [&](Tensor<float>& pool, Tensor<float>& own, int64_t t) -> const float* {
    if (t >= prefix) return own.row({b, kv, t - prefix});
    return pool.row({problem.tables.row(b)[t / in.block_size], t % in.block_size, kv});
  };
  std::vector<double> score;
  double top = -HUGE_VAL;
  for (int64_t t = first; t <= position; ++t) {
    const float *key = token(problem.key_pool, problem.k, t), *query = problem.q.row({b, head, s});
    double sum = 0;
    for (int64_t d = 0; d < in.dim; ++d) sum += double{key[d]} * query[d];
    score.push_back(sum * in.scale);
    top = std::max(top, score.back());
  }
  double total = 0, mix = 0;
  for (int64_t t = first; t <= position; ++t) {
    const double e = std::exp(score[static_cast<size_t>(t - first)] - top);
    total += e;
    mix += e * token(problem.value_pool, problem.v, t)[0];
  }
  return {mix / total, top + std::log(total)};
}

// Whether a right call was checked, and not a wrong one.
bool run(Random& random, Problem& problem, AttentionCall& call) {
  if (random.one_in(3)) {
    call.check_refused();
    return false;
  }
  const State before = call.state();
  check(call.run() == NABLA_FAST_OK, "right arguments are refused");
  const State after = call.state();
  call.check_inputs();
  if (call.nothing) check(call.same_state(before, after), "a call without queries has written");
  call.check_again(before, after);
  call.check_interleaved(before, after);
  call.check_rows_alone(before, after, problem.batch);
  return !call.nothing;
}

}  // namespace

FUZZ(prefix_attention) {
  Problem problem = Problem::draw(random);
  Tensor<float> output(random, problem.queries(), problem.dim);
  const int64_t row = problem.group * problem.kv_heads * problem.suffix;
  List<float> logsumexp(random, problem.batch * row);
  AttentionCall call(random, nabla_fast_prefix_attention);
  for (nabla_fast_heads_output* unused : {&call.args.dq, &call.args.dk, &call.args.dv})
    call.garbage(*unused);
  call.garbage(call.args.cotangent);
  problem.give(random, call);
  call.writes(By::kRows, call.args.output, output);
  Array& sums = call.writes(By::kRows, call.args.logsumexp, logsumexp);
  sums.row = row;
  sums.may_be_null = true;
  if (random.one_in(3)) sums.put_address(0);
  if (!run(random, problem, call)) return;

  const int64_t b = random.between(0, problem.batch - 1);
  const int64_t head = random.between(0, call.args.heads - 1);
  const int64_t s = random.between(0, problem.suffix - 1);
  const Expected want = expected(problem, call.args, b, head, s);
  // Scores of magnitude 1000 and more are known to few digits.
  double size = 0;
  for (int64_t d = 0; d < problem.dim; ++d)
    size = std::max(size, std::fabs(double{problem.q.row({b, head, s})[d]}));
  if (!problem.strange && size <= 4) {
    const double have = output.row({b, head, s})[0];
    check(std::fabs(have - want.output) <= 1e-3 * (std::fabs(want.output) + size),
          "far from what it is in double");
    const int64_t query = (b * call.args.heads + head) * problem.suffix + s;
    check(!call.args.logsumexp || std::fabs(logsumexp[query] - want.logsumexp) <=
                                      1e-4 * (1 + std::fabs(want.logsumexp)),
          "a logsumexp is far from what it is in double");
  }
}

FUZZ(prefix_attention_backward) {
  Problem problem = Problem::draw(random);
  Tensor<float> cotangent(random, problem.queries(), problem.dim);
  Tensor<float> dq(random, problem.queries(), problem.dim);
  Tensor<float> dk(random, problem.keys(), problem.dim), dv(random, problem.keys(), problem.dim);
  Values values(random);
  problem.fill(random, values, cotangent);
  AttentionCall call(random, nabla_fast_prefix_attention_backward,
                     nabla_fast_prefix_attention_backward_workspace);
  call.garbage(call.args.output);
  call.garbage(call.args.logsumexp);
  problem.give(random, call);
  call.reads(By::kRows, call.args.cotangent, cotangent);
  call.writes(By::kRows, call.args.dq, dq);
  call.writes(By::kRows, call.args.dk, dk);
  call.writes(By::kRows, call.args.dv, dv);
  run(random, problem, call);
}

}  // namespace fuzz
