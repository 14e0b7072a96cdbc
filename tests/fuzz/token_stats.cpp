#include "fuzz.h"

namespace fuzz {
namespace {

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
           same(entropy, other.entropy) && same(argmax, other.argmax) && same(status, other.status);
  }
};

// The arguments of a call, to be made wrong one by one.
struct Call {
  const void* logits;
  nabla_fast_dtype dtype;
  int64_t rows, vocab, stride;
  double tau;
  float *logsumexp, *confidence, *entropy;
  int64_t* argmax;
  nabla_fast_status* status;
  int32_t threads;

  nabla_fast_status operator()() const {
    return nabla_fast_token_stats(logits, dtype, rows, vocab, stride, tau, logsumexp, confidence,
                                  entropy, argmax, status, threads);
  }
};

void spoil(Random& random, Call& call) {
  switch (random.between(0, 11)) {
    case 0:
      call.logits = nullptr;
      break;
    case 1:
      call.logsumexp = nullptr;
      break;
    case 2:
      call.confidence = nullptr;
      break;
    case 3:
      call.entropy = nullptr;
      break;
    case 4:
      call.argmax = nullptr;
      break;
    case 5:
      call.status = nullptr;
      break;
    case 6:
      call.rows = random.negative();
      break;
    case 7:
      call.vocab = random.pick<int64_t>({0, random.negative()});
      break;
    case 8:
      call.rows = random.huge();
      break;
    case 9:
      call.vocab = random.huge();
      break;
    case 10:
      call.dtype = random.pick<nabla_fast_dtype>({-1, 2, INT32_MAX, INT32_MIN});
      break;
    default:
      call.tau = random.wrong_tau();
      break;
  }
  // A stride by itself is no mistake where there is one row.
  if (call.rows > 1 && random.one_in(8))
    call.stride = random.pick<int64_t>({random.huge(), INT64_MIN});
}

template <typename T>
void one(Random& random, nabla_fast_dtype dtype) {
  const int64_t rows = random.between(0, 6);
  const int64_t vocab = random.one_in(30) ? random.between(60000, 140000) : random.size(20000);
  Tensor<T> logits(random, {rows}, vocab);
  Values values(random);
  logits.each_row([&](T* row) { values.fill_logits(row, vocab); });
  Statistics found(random, rows), again(random, rows);
  const auto call_of = [&](Statistics& into, int64_t first, int64_t count, int32_t threads) {
    return Call{logits.row(first),
                dtype,
                count,
                vocab,
                logits.stride(0),
                1.0,
                into.logsumexp.data(),
                into.confidence.data(),
                into.entropy.data(),
                into.argmax.data(),
                into.status.data(),
                threads};
  };
  Call call = call_of(found, 0, rows, random.threads());
  call.tau = random.tau();
  const double tau = call.tau;
  if (random.one_in(3)) {
    const Statistics before = found;
    spoil(random, call);
    const nabla_fast_status status = call();
    check(refuses(status) || (rows == 0 && status == NABLA_FAST_OK),
          "wrong arguments are accepted");
    check(found == before && logits.untouched(), "a refused call has written");
    return;
  }
  check(call() == NABLA_FAST_OK, "right arguments are refused");
  check(logits.untouched(), "logits have changed");
  Call on_others = call_of(again, 0, rows, random.threads());
  on_others.tau = tau;
  check(on_others() == NABLA_FAST_OK && again == found, "the result depends on the threads");

  for (int64_t r = 0; r < rows; ++r) {
    const T* row = logits.row(r);
    check(found.status[r] == status_of(row, vocab), "a row's status is not that of its logits");
    Statistics alone(random, 1);
    Call of_row = call_of(alone, r, 1, 1);
    of_row.tau = tau;
    check(of_row() == NABLA_FAST_OK, "a row alone is refused");
    check(same(alone.logsumexp.data(), &found.logsumexp[r], 1) &&
              same(alone.confidence.data(), &found.confidence[r], 1) &&
              same(alone.entropy.data(), &found.entropy[r], 1) &&
              alone.argmax[0] == found.argmax[r] && alone.status[0] == found.status[r],
          "a row's result depends on the others");
    if (found.status[r] != NABLA_FAST_OK) {
      check(std::isnan(found.logsumexp[r]) && std::isnan(found.confidence[r]) &&
                std::isnan(found.entropy[r]) && found.argmax[r] == -1,
            "a row without an answer has one");
      continue;
    }
    check(found.argmax[r] == argmax(row, vocab), "argmax");
    const double top = Values::wide(row[found.argmax[r]]);
    double sum = 0, weighted = 0;
    for (int64_t v = 0; v < vocab; ++v) {
      const double x = (Values::wide(row[v]) - top) / tau;
      if (x < -700) continue;
      sum += std::exp(x);
      weighted += x * std::exp(x);
    }
    const double logsumexp = top / tau + std::log(sum), entropy = std::log(sum) - weighted / sum;
    const auto near = [](double a, double b, double scale) {
      return std::fabs(a - b) <= 1e-5 * (std::fabs(b) + scale);
    };
    if (std::fabs(logsumexp) < 1e38)
      check(near(found.logsumexp[r], logsumexp, 1), "logsumexp is far from what it is in double");
    check(near(found.confidence[r], 1 / sum, 1e-30), "confidence is far from what it is in double");
    check(near(found.entropy[r], entropy, 1), "entropy is far from what it is in double");
  }
}

}  // namespace

FUZZ(token_stats) {
  if (random.one_in(2))
    one<float>(random, NABLA_FAST_FLOAT32);
  else
    one<uint16_t>(random, NABLA_FAST_BFLOAT16);
}

}  // namespace fuzz
