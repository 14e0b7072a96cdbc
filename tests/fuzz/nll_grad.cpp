#include "fuzz.h"

namespace fuzz {
namespace {

struct Call {
  const float* hidden;
  int64_t rows, hidden_stride;
  const void* head;
  nabla_fast_dtype dtype;
  int64_t vocab, width, head_stride;
  const int64_t* targets;
  float* grad;
  int64_t grad_stride;
  nabla_fast_status* status;
  int32_t threads;

  int64_t bytes() const { return nabla_fast_nll_grad_workspace(rows, vocab, width); }
  nabla_fast_status operator()(void* workspace, int64_t size) const {
    return nabla_fast_nll_grad(hidden, rows, hidden_stride, head, dtype, vocab, width, head_stride,
                               targets, grad, grad_stride, status, workspace, size, threads);
  }
};

// Whether the workspace is to be too small as well.
bool spoil(Random& random, Call& call) {
  switch (random.between(0, 11)) {
    case 0:
      call.hidden = nullptr;
      break;
    case 1:
      call.head = nullptr;
      break;
    case 2:
      call.targets = nullptr;
      break;
    case 3:
      call.grad = nullptr;
      break;
    case 4:
      call.status = nullptr;
      break;
    case 5:
      call.rows = random.negative();
      break;
    case 6:
      call.vocab = random.pick<int64_t>({0, random.negative()});
      break;
    case 7:
      call.width = random.negative();
      break;
    case 8:
      call.vocab = random.huge();
      break;
    case 9:
      call.width = random.huge();
      break;
    case 10:
      call.dtype = random.pick<nabla_fast_dtype>({-1, 2, INT32_MAX, INT32_MIN});
      break;
    default:
      return true;
  }
  if (call.rows > 1 && random.one_in(8)) call.grad_stride = random.huge();
  return false;
}

template <typename T>
void one(Random& random, nabla_fast_dtype dtype) {
  const int64_t rows = random.one_in(30) ? random.between(60, 130) : random.between(0, 9);
  const int64_t width = random.between(1, 90);
  const int64_t vocab = random.one_in(30) ? random.between(8000, 18000) : random.size(400);
  Tensor<float> hidden(random, {rows}, width), grad(random, {rows}, width);
  Tensor<T> head(random, {vocab}, width);
  Values values(random);
  hidden.each_row([&](float* row) { values.fill_plain(row, width); });
  const bool strange = random.one_in(5);
  head.each_row([&](T* row) {
    values.fill_plain(row, width);
    if (strange && random.one_in(2))
      Values::set(row[random.between(0, width - 1)], random.pick({kNaN, kInfinity, -kInfinity}));
  });
  Memory<int64_t> targets(random, rows);
  for (int64_t r = 0; r < rows; ++r) targets[r] = random.between(0, vocab - 1);
  Memory<nabla_fast_status> status(random, rows);
  Call call{hidden.data(),  rows,          hidden.stride(0), head.data(),    dtype,
            vocab,          width,         head.stride(0),   targets.data(), grad.data(),
            grad.stride(0), status.data(), random.threads()};
  if (random.one_in(3)) {
    const Memory<nabla_fast_status> before = status;
    const bool small = spoil(random, call);
    if (!small && rows > 0 && random.one_in(8))
      targets[random.between(0, rows - 1)] =
          random.pick<int64_t>({-1, vocab, INT64_MAX, INT64_MIN});
    // A size query answers whatever it is asked.
    const int64_t bytes = call.bytes();
    check(bytes >= 0, "a size is negative");
    const int64_t given = small && bytes > 0 ? bytes - 1 : std::min<int64_t>(bytes, 1 << 20);
    Workspace workspace(random, given, 0xAA);
    const nabla_fast_status refused = call(workspace.data(), given);
    check(refuses(refused) || (rows == 0 && refused == NABLA_FAST_OK),
          "wrong arguments are accepted");
    check(grad.untouched() && same(status, before), "a refused call has written");
    return;
  }
  const auto run = [&](const Call& c, int fill) {
    Workspace workspace(random, c.bytes(), fill);
    check(c(workspace.data(), c.bytes()) == NABLA_FAST_OK, "right arguments are refused");
  };
  run(call, 0xFF);
  check(hidden.untouched() && head.untouched(), "inputs have changed");
  const std::vector<float> found = grad.elements();
  const Memory<nabla_fast_status> statuses = status;
  call.threads = random.threads();
  run(call, 0);
  check(same(grad.elements(), found) && same(status, statuses),
        "the result depends on the threads or on what the workspace holds");
  for (int64_t r = 0; r < rows; r += random.between(1, 4)) {
    check(status[r] >= NABLA_FAST_OK && status[r] <= NABLA_FAST_ROW_ALL_MASKED, "a row's status");
    if (status[r] != NABLA_FAST_OK)
      for (int64_t k = 0; k < width; ++k)
        check(std::isnan(grad.row(r)[k]), "an answer to a bad row");
    Tensor<float> alone(random, {1}, width);
    Memory<nabla_fast_status> of_row(random, 1);
    Call single = call;
    single.hidden = hidden.row(r);
    single.targets = targets.data() + r;
    single.rows = 1;
    single.grad = alone.data();
    single.status = of_row.data();
    run(single, 0x55);
    check(same(alone.row(0), grad.row(r), width) && of_row[0] == status[r],
          "a row's result depends on the others");
  }
}

}  // namespace

FUZZ(nll_grad) {
  if (random.one_in(2))
    one<float>(random, NABLA_FAST_FLOAT32);
  else
    one<uint16_t>(random, NABLA_FAST_BFLOAT16);
}

}  // namespace fuzz
