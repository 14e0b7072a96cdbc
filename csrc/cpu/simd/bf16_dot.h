// The dot product of two pairs of bf16, of AVX-512.
#ifndef NABLA_FAST_CPU_SIMD_BF16_DOT_H_
#define NABLA_FAST_CPU_SIMD_BF16_DOT_H_

#include <cstdint>

#include "base/isa.h"
#include "simd/vec.h"

#define NABLA_FAST_BF16_DOT (NABLA_FAST_X86 || NABLA_FAST_EMULATED)

#if NABLA_FAST_EMULATED
  #include "emulation/units.h"
#endif

namespace nabla_fast {

#if NABLA_FAST_BF16_DOT
// total += a.lower * b.lower + a.upper * b.upper, lane by lane; the unit adds the upper product
// first, and takes and makes 0 for what lies below 2^-126.
NABLA_FAST_INLINE void add_bf16_dot(Floats<16>& total, VecTypes<16>::Bits a, VecTypes<16>::Bits b) {
  #if NABLA_FAST_EMULATED
  emulated::add_dot_products(reinterpret_cast<float*>(&total), reinterpret_cast<uint32_t*>(&a),
                             reinterpret_cast<uint32_t*>(&b));
  #else
  // The intrinsic would have to be called from functions of one instruction set.
  asm("vdpbf16ps %2, %1, %0" : "+v"(total) : "v"(a), "v"(b));
  #endif
}

// A pair in every lane. gcc would fill the lanes one by one, each by an instruction of its own.
NABLA_FAST_INLINE VecTypes<16>::Bits broadcast_pair(const uint16_t* pair) {
  typedef uint32_t Word __attribute__((aligned(2), may_alias));
  const Word* const word = reinterpret_cast<const Word*>(pair);
  #if NABLA_FAST_AVX512
  VecTypes<16>::Bits pairs;
  asm("vpbroadcastd %1, %0" : "=v"(pairs) : "m"(*word));
  return pairs;
  #else
  return VecTypes<16>::Bits{} + *word;
  #endif
}
#endif

}  // namespace nabla_fast

#endif  // NABLA_FAST_CPU_SIMD_BF16_DOT_H_
