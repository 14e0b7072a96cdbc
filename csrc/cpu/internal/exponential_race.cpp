#include "internal/exponential_race.h"

#include <algorithm>
#include <cmath>
#include <cstring>

#include "base/isa.h"

namespace nabla_fast::internal {
namespace {

constexpr int kWords = 624, kShift = 397;

NABLA_FAST_INLINE uint32_t twisted(uint32_t upper, uint32_t lower, uint32_t far) {
  uint32_t mixed = (upper & 0x80000000u) | (lower & 0x7fffffffu);
  return far ^ (mixed >> 1) ^ ((lower & 1u) ? 0x9908b0dfu : 0u);
}

// The next 624 words, in place (Matsumoto & Nishimura 1998).
NABLA_FAST_INLINE void renew_kernel(uint32_t* words) {
  for (int n = 0; n < kWords - kShift; ++n)
    words[n] = twisted(words[n], words[n + 1], words[n + kShift]);
  // Two loops, so that each reads only words that it has not written within a vector's width.
  for (int n = kWords - kShift; n < kWords - 1; ++n)
    words[n] = twisted(words[n], words[n + 1], words[n + kShift - kWords]);
  words[kWords - 1] = twisted(words[kWords - 1], words[0], words[kShift - 1]);
}

NABLA_FAST_FOR_EACH_ISA(renew, renew_kernel)

uint32_t tempered(uint32_t word) {
  word ^= word >> 11;
  word ^= (word << 7) & 0x9d2c5680u;
  word ^= (word << 15) & 0xefc60000u;
  return word ^ (word >> 18);
}

// A stream of words that can be read at any index ahead.
class Words {
 public:
  explicit Words(Mt19937* generator)
      : generator_(generator),
        renew_(renew.select()),
        // Once the last word is taken, torch renews the state at the next draw.
        next_(generator->left == 1 ? kWords : static_cast<int64_t>(generator->next)) {
    for (int n = 0; n < kWords; ++n) words_[n] = static_cast<uint32_t>(generator->state[n]);
  }

  // The word `ahead` places behind the generator's position; indices must not decrease.
  uint32_t at(int64_t ahead) {
    go_to(next_ + ahead);
    return tempered(words_[next_ + ahead - start_]);
  }

  // Leave the generator behind `count` words.
  void finish(int64_t count) {
    // The state is renewed when a word of the next one is drawn, not before.
    if (count > 0) go_to(next_ + count - 1);
    int64_t next = next_ + count - start_;
    generator_->next = static_cast<uint64_t>(next);
    generator_->left = static_cast<int32_t>(kWords + 1 - next);
    for (int n = 0; n < kWords; ++n) generator_->state[n] = words_[n];
  }

 private:
  void go_to(int64_t index) {
    while (index - start_ >= kWords) {
      renew_(words_);
      start_ += kWords;
    }
  }

  Mt19937* generator_;
  void (*renew_)(uint32_t*);
  uint32_t words_[kWords];
  int64_t start_ = 0;  // index of words_[0]
  int64_t next_;
};

}  // namespace

template <typename T>
int64_t exponential_race(Mt19937* generator, int64_t vocab, const int64_t* tokens,
                         const T* probabilities, int64_t count) {
  Words words(generator);
  int64_t winner = tokens[0];
  T best = -1;
  for (int64_t n = 0; n < count; ++n) {
    uint64_t high = words.at(2 * tokens[n]);
    uint64_t bits = (high << 32) | words.at(2 * tokens[n] + 1);
    double uniform = static_cast<double>(bits & ((uint64_t{1} << 53) - 1)) * 0x1p-53;
    T q = static_cast<T>(-std::log1p(-uniform));
    T score = probabilities[n] / q;
    if (score > best) {
      best = score;
      winner = tokens[n];
    }
  }
  words.finish(2 * vocab);
  return winner;
}

template int64_t exponential_race(Mt19937*, int64_t, const int64_t*, const float*, int64_t);
template int64_t exponential_race(Mt19937*, int64_t, const int64_t*, const double*, int64_t);

}  // namespace nabla_fast::internal
