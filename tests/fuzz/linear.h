// Hidden states and a head, and what their logits are in double.
#ifndef NABLA_FAST_FUZZ_LINEAR_H_
#define NABLA_FAST_FUZZ_LINEAR_H_

#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "call.h"
#include "fuzz.h"
#include "head_map.h"
#include "tensor.h"

namespace fuzz {

constexpr double kNear = 2e-5;
// Sums of what fp32 takes for 0.
constexpr double kTiny = 1e-35;

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

// Hidden states [rows, width], a head [vocab, width] and what is done to their products.
struct Linear {
  int64_t rows, vocab, width;
  Matrix hidden, head;
  HeadMap map;

  Linear(Random& random, int64_t n, int64_t v)
      : Linear{random, n, v, random.one_in(15) ? 0 : random.between(1, 100), fuzz::dtype(random)} {}
  Linear(Random& random, int64_t n, int64_t v, int64_t w, nabla_fast_dtype dtype)
      : rows(n),
        vocab(v),
        width(w),
        hidden(random, n, w, dtype),
        head(random, v, w, fuzz::dtype(random)),
        map(random, v) {
    Values values(random);
    hidden.plain(values);
    const bool strange = width > 0 && random.one_in(5);
    head.with([&](auto& tensor) {
      tensor.each_row([&](auto* row) {
        values.fill_plain(row, width);
        if (strange && random.one_in(2))
          Values::set(row[random.between(0, width - 1)],
                      random.pick({kNaN, kInfinity, -kInfinity, -kInfinity}));
      });
    });
  }
  template <typename Args>
  void give(Call<Args>& call) {
    call.reads(By::kRows, call.args.hidden, hidden);
    call.reads(By::kOthers, call.args.head, head);
    map.give(call);
    if (width > 0)
      call.any_mistake([&call] {
        call.args.hidden.width = call.args.head.width = std::numeric_limits<int64_t>::max();
      });
  }
};

// A row of logits in double.
struct Row {
  std::vector<double> z;
  double size = 0;      // of any of its logits
  double products = 0;  // of any before the map
  double logsumexp = 0, top = -HUGE_VAL;
  bool nan = false, infinite = false, flushed = false;

  Row(Linear& linear, int64_t r, double tau) {
    for (int64_t v = 0; v < linear.vocab; ++v) {
      Sum sum;
      sum.add(linear.hidden, r, linear.head, v);
      const double logit = linear.map.z(v, sum.value);
      z.push_back(logit);
      nan |= std::isnan(logit);
      flushed |= sum.flushed;
      infinite |= logit == HUGE_VAL;
      size = std::max(size, linear.map.size(v, sum.size));
      products = std::max(products, sum.size);
      top = std::max(top, logit);
    }
    double of_exps = 0;
    for (const double value : z) of_exps += std::exp((value - top) / tau);
    logsumexp = top / tau + std::log(of_exps);
  }
  // Beyond, fp32 has infinities of its own.
  bool moderate() const { return size < 1e30 && products < 1e30 && !flushed; }
  nabla_fast_status status() const {
    return nan                ? NABLA_FAST_ROW_NAN
           : infinite         ? NABLA_FAST_ROW_INFINITE
           : top == -HUGE_VAL ? NABLA_FAST_ROW_ALL_MASKED
                              : NABLA_FAST_OK;
  }
};

inline bool is_row_status(nabla_fast_status status) {
  return status >= NABLA_FAST_OK && status <= NABLA_FAST_ROW_ALL_MASKED;
}

// Numbers of rows and tokens that no block divides.
struct Sizes {
  int64_t rows, vocab;

  explicit Sizes(Random& random)
      : rows(random.one_in(12) ? random.between(60, 140) : random.between(0, 9)),
        vocab(random.one_in(15) ? random.between(2000, 5000) : random.size(700)) {}
};

}  // namespace fuzz

#endif  // NABLA_FAST_FUZZ_LINEAR_H_
