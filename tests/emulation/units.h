// Arithmetic units that a CPU may lack, in software: Intel's matrix unit (AMX, bf16 part) and the dot
// product of bf16 of AVX-512. For tests: built with NABLA_FAST_EMULATED_FROM, the kernels call these
// functions in place of the instructions (csrc/cpu/base/isa.h).
//
// Results have the bits that Intel's manual defines, but for what a NaN carries; compare.cpp holds them
// against a CPU that has the units. Memory is read and written row by row, so that sanitizers see every
// access. What the CPU would fault on ends the process with one line that says what was wrong.
#ifndef NABLA_FAST_TESTS_EMULATION_UNITS_H_
#define NABLA_FAST_TESTS_EMULATION_UNITS_H_

#include <cstdint>

namespace nabla_fast::emulated {

// LDTILECFG: shapes of the eight tiles, 64 bytes in the instruction's format. The tiles of this thread
// are zeros then.
void load_config(const void* shapes);

// TILERELEASE.
void release();

// TILELOADD and TILESTORED: rows of a tile, `stride` bytes apart.
void load_tile(int tile, const void* from, int64_t stride);
void store_tile(int tile, void* to, int64_t stride);

// TDPBF16PS: tile c += tile a times tile b, of pairs of bf16.
void add_product(int c, int a, int b);

// VDPBF16PS: 16 floats += dot products of 16 pairs of bf16, the lower one of a word the first.
void add_dot_products(float* total, const uint32_t* a, const uint32_t* b);

}  // namespace nabla_fast::emulated

#endif  // NABLA_FAST_TESTS_EMULATION_UNITS_H_
