#include "fuzz.h"

namespace fuzz {
namespace {

nabla_fast_strides strides(const Tensor<float>& tensor) {
  return {tensor.stride(0), tensor.stride(1), tensor.stride(2)};
}

nabla_fast_pool_strides pool_strides(const Tensor<float>& tensor) {
  return {tensor.stride(0), tensor.stride(1), tensor.stride(2)};
}

struct Problem {
  int64_t batch, group, kv_heads, suffix, dim, block_size, width, blocks;
  Tensor<float> q, k, v, key_pool, value_pool, output, cotangent, dq, dk, dv;
  Tensor<int64_t> tables;
  Memory<int64_t> lengths;
  bool strange;  // whether inputs hold NaN and infinities
  nabla_fast_attention in;

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
        output(random, {b, g * h, s}, d),
        cotangent(random, {b, g * h, s}, d),
        dq(random, {b, g * h, s}, d),
        dk(random, {b, h, s}, d),
        dv(random, {b, h, s}, d),
        tables(random, {b}, w),
        lengths(random, b) {
    Values values(random);
    strange = random.one_in(10);
    const auto fill = [&](float* row) {
      values.fill_plain(row, d);
      if (strange && random.one_in(20))
        row[random.between(0, d - 1)] = random.pick({kNaN, kInfinity, -kInfinity});
    };
    for (Tensor<float>* tensor : {&q, &k, &v, &key_pool, &value_pool, &cotangent})
      tensor->each_row(fill);
    for (int64_t n = 0; n < b; ++n) lengths[n] = random.between(0, w * size);
    int64_t n = 0;
    tables.each_row([&](int64_t* row) {
      // Behind a prefix stands what nobody may follow.
      for (int64_t i = 0; i < w; ++i)
        row[i] = i * size < lengths[n] ? random.between(0, blocks - 1)
                                       : random.pick<int64_t>({INT64_MIN, INT64_MAX, -1, blocks});
      ++n;
    });
    in.batch = b;
    in.heads = g * h;
    in.kv_heads = h;
    in.suffix = s;
    in.dim = d;
    in.blocks = blocks;
    in.block_size = size;
    in.table_width = w;
    in.window = random.one_in(2) ? 0 : random.pick<int64_t>({1, 2, 7, 64, INT64_MAX});
    in.scale = random.pick({1.0, 0.125, 0.0, -1.0});
    in.q = q.data();
    in.k = k.data();
    in.v = v.data();
    in.key_pool = key_pool.data();
    in.value_pool = value_pool.data();
    in.block_tables = tables.data();
    in.prefix_lengths = lengths.data();
    in.table_stride = tables.stride(0);
    in.q_strides = strides(q);
    in.k_strides = strides(k);
    in.v_strides = strides(v);
    in.key_pool_strides = pool_strides(key_pool);
    in.value_pool_strides = pool_strides(value_pool);
  }
  bool nothing() const { return batch == 0 || group == 0 || suffix == 0; }
  // One sequence of it by itself.
  nabla_fast_attention only(int64_t b) {
    nabla_fast_attention one = in;
    one.batch = 1;
    one.q = q.row({b});
    one.k = k.row({b});
    one.v = v.row({b});
    one.block_tables += b * in.table_stride;
    one.prefix_lengths += b;
    return one;
  }
  bool inputs_untouched() {
    bool same = tables.untouched();
    for (Tensor<float>* tensor : {&q, &k, &v, &key_pool, &value_pool, &cotangent})
      same = tensor->untouched() && same;
    return same;
  }
};

void spoil(Random& random, Problem& problem) {
  nabla_fast_attention& in = problem.in;
  switch (random.between(0, 21)) {
    case 0:
      in.q = nullptr;
      break;
    case 1:
      in.k = nullptr;
      break;
    case 2:
      in.v = nullptr;
      break;
    case 3:
      in.prefix_lengths = nullptr;
      break;
    case 4:
      in.batch = random.negative();
      break;
    case 5:
      in.heads = random.negative();
      break;
    case 6:
      in.kv_heads = random.pick<int64_t>({0, random.negative()});
      break;
    case 7:
      in.suffix = random.negative();
      break;
    case 8:
      in.dim = random.pick<int64_t>({0, random.negative(), NABLA_FAST_MOST_HEAD_DIM + 1});
      break;
    case 9:
      in.block_size = random.pick<int64_t>({0, random.negative()});
      break;
    case 10:
      in.table_width = random.negative();
      break;
    case 11:
      in.window = random.negative();
      break;
    case 12:
      in.batch = random.huge();
      break;
    case 13:
      in.suffix = random.huge();
      break;
    case 14:
      in.dim = random.huge();
      break;
    case 15:
      in.table_width = random.huge();
      break;
    case 16:
      in.block_size = random.huge();
      break;
    case 17:
      in.blocks = random.pick<int64_t>({random.negative(), random.huge()});
      break;
    case 18:
      in.q_strides.batch = in.k_strides.head = random.huge();
      in.v_strides.token = INT64_MIN;
      in.key_pool_strides.block = random.huge();
      in.batch += 2;
      break;
    case 19:
      in.heads = in.kv_heads * problem.group + 1;
      in.kv_heads += in.kv_heads == 1;
      in.heads += in.heads % in.kv_heads == 0;
      break;
    case 20: {
      // A prefix that is too long for its table, or has no length.
      if (problem.batch == 0) {
        in.dim = 0;
        break;
      }
      problem.lengths[random.between(0, problem.batch - 1)] =
          random.pick<int64_t>({-1, INT64_MIN, INT64_MAX, problem.width * problem.block_size + 1});
      break;
    }
    default: {
      // A block that is not in the pool, within a prefix.
      if (problem.batch == 0 || problem.width == 0) {
        in.dim = 0;
        break;
      }
      const int64_t b = random.between(0, problem.batch - 1);
      problem.lengths[b] = problem.width * problem.block_size;
      problem.tables.row(b)[random.between(0, problem.width - 1)] =
          random.pick<int64_t>({-1, problem.blocks, INT64_MIN, INT64_MAX});
      break;
    }
  }
}

// The first result of a query of a sequence, in double.
double expected(Problem& problem, int64_t b, int64_t head, int64_t s) {
  const nabla_fast_attention& in = problem.in;
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
  return mix / total;
}

}  // namespace

FUZZ(prefix_attention) {
  Problem problem = Problem::draw(random);
  int32_t threads = random.threads();
  const nabla_fast_strides to = strides(problem.output);
  if (random.one_in(3)) {
    float* output = problem.output.data();
    nabla_fast_strides wrong = to;
    const int64_t kind = random.between(0, 24);
    if (kind == 0) output = nullptr;
    if (kind == 1) wrong.batch = wrong.head = wrong.token = INT64_MIN;
    const bool certain = kind > 1 || problem.in.batch * problem.group * problem.suffix > 1;
    if (kind > 1) spoil(random, problem);
    const nabla_fast_status status = nabla_fast_prefix_attention(
        random.one_in(25) ? nullptr : &problem.in, output, wrong, threads);
    check(refuses(status) || problem.nothing() || (!certain && kind == 1),
          "wrong inputs are accepted");
    if (kind != 1) check(problem.output.untouched(), "a refused call has written");
    return;
  }
  const auto run = [&](const nabla_fast_attention& in, float* output) {
    check(nabla_fast_prefix_attention(&in, output, to, threads) == NABLA_FAST_OK,
          "right inputs are refused");
  };
  run(problem.in, problem.output.data());
  check(problem.inputs_untouched(), "inputs have changed");
  const std::vector<float> found = problem.output.elements();
  threads = random.threads();
  run(problem.in, problem.output.data());
  check(same(problem.output.elements(), found), "the result depends on the threads");
  if (problem.nothing()) return;
  for (int64_t b = 0; b < problem.batch; ++b) run(problem.only(b), problem.output.row({b}));
  check(same(problem.output.elements(), found), "a sequence's result depends on the others");

  const int64_t b = random.between(0, problem.batch - 1);
  const int64_t head = random.between(0, problem.in.heads - 1);
  const int64_t s = random.between(0, problem.suffix - 1);
  const double want = expected(problem, b, head, s);
  // Scores of magnitude 1000 and more are known to few digits.
  double size = 0;
  for (int64_t d = 0; d < problem.dim; ++d)
    size = std::max(size, std::fabs(double{problem.q.row({b, head, s})[d]}));
  if (!problem.strange && size <= 4) {
    const double have = problem.output.row({b, head, s})[0];
    check(std::fabs(have - want) <= 1e-3 * (std::fabs(want) + size),
          "far from what it is in double");
  }
}

FUZZ(prefix_attention_backward) {
  Problem problem = Problem::draw(random);
  float *dq = problem.dq.data(), *dk = problem.dk.data(), *dv = problem.dv.data();
  const float* cotangent = problem.cotangent.data();
  int32_t threads = random.threads();
  const auto call = [&](const nabla_fast_attention* in, void* workspace, int64_t bytes) {
    return nabla_fast_prefix_attention_backward(in, cotangent, strides(problem.cotangent), dq,
                                                strides(problem.dq), dk, strides(problem.dk), dv,
                                                strides(problem.dv), workspace, bytes, threads);
  };
  if (random.one_in(3)) {
    int64_t short_by = 0;
    switch (random.between(0, 14)) {
      case 0:
        cotangent = nullptr;
        break;
      case 1:
        dq = nullptr;
        break;
      case 2:
        dk = nullptr;
        break;
      case 3:
        dv = nullptr;
        break;
      case 4:
        short_by = 1;
        break;
      default:
        spoil(random, problem);
        break;
    }
    const nabla_fast_attention* in = random.one_in(25) ? nullptr : &problem.in;
    const int64_t bytes = nabla_fast_prefix_attention_backward_workspace(in, threads);
    check(bytes >= 0, "a size is negative");
    const int64_t size = std::max<int64_t>(std::min<int64_t>(bytes, 1 << 22) - short_by, 0);
    Workspace workspace(random, size, 0xAA);
    const nabla_fast_status status = call(in, workspace.data(), size);
    check(refuses(status) || problem.nothing(), "wrong inputs are accepted");
    check(problem.dq.untouched() && problem.dk.untouched() && problem.dv.untouched(),
          "a refused call has written");
    return;
  }
  const auto run = [&](const nabla_fast_attention& in, int fill) {
    const int64_t bytes = nabla_fast_prefix_attention_backward_workspace(&in, threads);
    Workspace workspace(random, bytes, fill);
    check(call(&in, workspace.data(), bytes) == NABLA_FAST_OK, "right inputs are refused");
  };
  run(problem.in, 0xFF);
  check(problem.inputs_untouched(), "inputs have changed");
  const std::vector<float> of_q = problem.dq.elements(), of_k = problem.dk.elements(),
                           of_v = problem.dv.elements();
  const auto unchanged = [&] {
    return same(problem.dq.elements(), of_q) && same(problem.dk.elements(), of_k) &&
           same(problem.dv.elements(), of_v);
  };
  threads = random.threads();
  run(problem.in, 0);
  check(unchanged(), "the result depends on the threads or on what the workspace holds");
  if (problem.nothing()) return;
  for (int64_t b = 0; b < problem.batch; ++b) {
    cotangent = problem.cotangent.row({b});
    dq = problem.dq.row({b});
    dk = problem.dk.row({b});
    dv = problem.dv.row({b});
    run(problem.only(b), 0x55);
  }
  check(unchanged(), "a sequence's result depends on the others");
}

}  // namespace fuzz
