// What a call does to the products of head and hidden states, and what it is in double.
#ifndef NABLA_FAST_FUZZ_HEAD_MAP_H_
#define NABLA_FAST_FUZZ_HEAD_MAP_H_

#include <cmath>
#include <limits>

#include "call.h"
#include "fuzz.h"
#include "tensor.h"

namespace fuzz {

struct HeadMap {
  bool any, biased;
  List<float> bias;
  double scale, softcap;

  HeadMap(Random& random, int64_t vocab)
      : any(random.one_in(3)),
        biased(any && random.one_in(2)),
        bias(random, vocab),
        scale(any ? random.pick({0.0, 1.0, -0.5, 3.0, 1e-30}) : 0.0),
        softcap(any ? random.pick({0.0, 0.0, 30.0, 0.25, 1e4}) : 0.0) {
    Values values(random);
    for (int64_t v = 0; v < vocab; ++v)
      // Not all are masked, and none is of a logit of +inf.
      bias[v] = v > 0 && scale >= 0 && random.one_in(50) ? -kInfinity : values.plain();
    bias.seal();
  }
  template <typename Args>
  void give(Call<Args>& call) {
    nabla_fast_head_map& map = call.args.head_map;
    if (biased) call.reads(By::kOthers, map.bias, bias).may_be_null = true;
    map.scale = scale;
    map.softcap = softcap;
    Random& random = call.random();
    call.mistake(NABLA_FAST_INVALID_SOFTCAP, [&map, &random] {
      map.softcap = random.pick({-1.0, HUGE_VAL, double{kNaN}, 1e-300, 1e300, -0x1p-70});
    });
    call.mistake(NABLA_FAST_INVALID_SCALE, [&map, &random] {
      map.scale = random.pick({HUGE_VAL, -HUGE_VAL, double{kNaN}, 1e300, -1e39});
    });
  }
  // The logit of a product.
  double z(int64_t v, double u) {
    const double sum = (u + (biased ? double{bias[v]} : 0.0)) * factor();
    return softcap == 0 ? sum : softcap * std::tanh(sum / softcap);
  }
  // By how much more than a product its logit may differ.
  double size(int64_t v, double of_product) {
    const double own = biased && std::isfinite(bias[v]) ? std::fabs(bias[v]) : 0.0;
    return (of_product + own) * std::fabs(factor()) + softcap;
  }
  double factor() const {
    return scale == 0 ? 1.0 : static_cast<double>(static_cast<float>(scale));
  }
};

}  // namespace fuzz

#endif  // NABLA_FAST_FUZZ_HEAD_MAP_H_
