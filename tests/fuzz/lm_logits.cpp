#include "fuzz.h"

namespace fuzz {
namespace {

struct Call {
  const float* hidden;
  int64_t rows, hidden_stride;
  const void* head;
  nabla_fast_dtype dtype;
  int64_t vocab, width, head_stride;
  float* logits;
  int64_t logits_stride;
  int32_t threads;

  nabla_fast_status operator()() const {
    return nabla_fast_lm_logits(hidden, rows, hidden_stride, head, dtype, vocab, width, head_stride,
                                logits, logits_stride, threads);
  }
};

void spoil(Random& random, Call& call) {
  switch (random.between(0, 8)) {
    case 0:
      call.hidden = nullptr;
      break;
    case 1:
      call.head = nullptr;
      break;
    case 2:
      call.logits = nullptr;
      break;
    case 3:
      call.rows = random.negative();
      break;
    case 4:
      call.vocab = random.negative();
      break;
    case 5:
      call.width = random.negative();
      break;
    case 6:
      call.vocab = random.huge();
      break;
    case 7:
      call.width = random.huge();
      break;
    default:
      call.dtype = random.pick<nabla_fast_dtype>({-1, 2, INT32_MAX, INT32_MIN});
      break;
  }
  if (call.rows > 1 && random.one_in(8)) call.logits_stride = random.huge();
  if (call.rows > 1 && random.one_in(8)) call.hidden_stride = INT64_MIN;
}

template <typename T>
void one(Random& random, nabla_fast_dtype dtype) {
  const int64_t rows = random.one_in(4) ? random.between(0, 40) : random.between(0, 6);
  const int64_t width = random.between(1, 150);
  const int64_t vocab = random.one_in(30) ? random.between(3000, 9000) : random.size(600);
  Tensor<float> hidden(random, {rows}, width), logits(random, {rows}, vocab);
  Tensor<T> head(random, {vocab}, width);
  Values values(random);
  hidden.each_row([&](float* row) { values.fill_plain(row, width); });
  head.each_row([&](T* row) { values.fill_plain(row, width); });
  Call call{hidden.data(),  rows,          hidden.stride(0), head.data(),     dtype, vocab, width,
            head.stride(0), logits.data(), logits.stride(0), random.threads()};
  if (random.one_in(3)) {
    spoil(random, call);
    const nabla_fast_status status = call();
    check(refuses(status) || (rows == 0 && status == NABLA_FAST_OK),
          "wrong arguments are accepted");
    check(logits.untouched(), "a refused call has written");
    return;
  }
  check(call() == NABLA_FAST_OK, "right arguments are refused");
  check(hidden.untouched() && head.untouched(), "inputs have changed");
  const std::vector<float> found = logits.elements();
  call.threads = random.threads();
  check(call() == NABLA_FAST_OK && same(logits.elements(), found),
        "the result depends on the threads");
  for (int64_t r = 0; r < rows; ++r) {
    Tensor<float> alone(random, {1}, vocab);
    call.hidden = hidden.row(r);
    call.rows = 1;
    call.logits = alone.data();
    check(call() == NABLA_FAST_OK && same(alone.row(0), logits.row(r), vocab),
          "a row's result depends on the others");
  }
  for (int n = 0; n < 20 && rows > 0; ++n) {
    const int64_t r = random.between(0, rows - 1), v = random.between(0, vocab - 1);
    double sum = 0, size = 0;
    for (int64_t k = 0; k < width; ++k) {
      const double term = double{hidden.row(r)[k]} * Values::wide(head.row(v)[k]);
      sum += term;
      size += std::fabs(term);
    }
    // Products may be beyond fp32 at either end.
    if (size < 1e37)
      check(std::fabs(logits.row(r)[v] - sum) <= 1e-5 * size + 1e-40 * static_cast<double>(width),
            "a logit is far from what it is in double");
  }
}

}  // namespace

FUZZ(lm_logits) {
  if (random.one_in(2))
    one<float>(random, NABLA_FAST_FLOAT32);
  else
    one<uint16_t>(random, NABLA_FAST_BFLOAT16);
}

}  // namespace fuzz
