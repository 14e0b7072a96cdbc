// Joins of one value a thread over a warp or a block, in an order that depends on nothing else.
#ifndef NABLA_FAST_CUDA_JOINS_H_
#define NABLA_FAST_CUDA_JOINS_H_

#include "device.h"
#include "exponential.h"

namespace nabla_fast::cuda {

// Threads of every block that joins.
constexpr int kThreads = 256;
constexpr int kWarps = kThreads / kWarpThreads;

NABLA_FAST_DEVICE int lane() { return static_cast<int>(threadIdx.x % kWarpThreads); }
NABLA_FAST_DEVICE int warp() { return static_cast<int>(threadIdx.x / kWarpThreads); }

// The largest logit of some tokens and the first token that has it.
struct Top {
  float value;
  int token;
};
// Of no tokens, or of masked ones alone.
NABLA_FAST_DEVICE Top no_top() { return {-kInfinity, 0x7FFFFFFF}; }

NABLA_FAST_DEVICE Top shuffle_xor(Top top, unsigned lanes) {
  return {shuffle_xor(top.value, lanes), shuffle_xor(top.token, lanes)};
}

struct Largest {
  NABLA_FAST_DEVICE float operator()(float a, float b) const { return fmaxf(a, b); }
  NABLA_FAST_DEVICE Top operator()(Top a, Top b) const {
    return b.value > a.value || (b.value == a.value && b.token < a.token) ? b : a;
  }
};

struct Sum {
  template <typename T>
  NABLA_FAST_DEVICE T operator()(T a, T b) const {
    return a + b;
  }
};

// Every lane's result is the same.
template <typename T, typename Join>
NABLA_FAST_DEVICE T join_warp(T value, Join join) {
  for (unsigned lanes = kWarpThreads / 2; lanes > 0; lanes /= 2)
    value = join(value, shuffle_xor(value, lanes));
  return value;
}

NABLA_FAST_DEVICE bool any_of_warp(bool value) { return ballot(kAllLanes, value) != 0; }

template <typename T>
struct OfWarps {
  T of[kWarps];
};

// Every thread's result is the same.
template <typename T, typename Join>
NABLA_FAST_DEVICE T join_block(T value, Join join) {
  NABLA_FAST_SHARED(OfWarps<T>, parts);
  value = join_warp(value, join);
  // The last join's parts have been read.
  sync_block();
  if (lane() == 0) parts.of[warp()] = value;
  sync_block();
  value = parts.of[0];
  for (int n = 1; n < kWarps; ++n) value = join(value, parts.of[n]);
  return value;
}

NABLA_FAST_DEVICE bool any_of_block(bool value) {
  NABLA_FAST_SHARED(OfWarps<int>, parts);
  const int any = any_of_warp(value);
  sync_block();
  if (lane() == 0) parts.of[warp()] = any;
  sync_block();
  int all = 0;
  for (int n = 0; n < kWarps; ++n) all |= parts.of[n];
  return all != 0;
}

}  // namespace nabla_fast::cuda

#endif  // NABLA_FAST_CUDA_JOINS_H_
