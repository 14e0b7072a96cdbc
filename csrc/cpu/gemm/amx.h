// Both products of vocab_tiles.h with bf16 tables on the CPU's matrix unit (Intel AMX), which
// multiplies tiles of bf16 and adds up in fp32.
//
// Float32 rows and weights enter as three bf16 terms each, whose sum they are exactly: the upper 16
// bits of a number, then those of the remainder, twice. Terms below 2^-126 count as 0.
//
// A float32 table would need three terms too, and six products of terms: tried, and a gain of a
// tenth over multiply-adds at 64 rows was a loss of a third at 16.
#ifndef NABLA_FAST_CPU_GEMM_AMX_H_
#define NABLA_FAST_CPU_GEMM_AMX_H_

#include "base/prefetch.h"
#include "gemm/vocab_tiles.h"

namespace nabla_fast::gemm {

// Rows in the form of products_amx(): terms of pairs of columns, [pairs, terms, lanes], zeros
// behind the width. `memory`: PackedRows::bytes(), aligned to 64.
PackedRows pack_amx(const Table& from, int rows, void* memory);

// products(), of rows that pack_amx() packed and a table of bf16.
void products_amx(const PackedRows& rows, const Table& table, int tokens, bool add, float* z);

// add_weighted_sums() of a table of bf16, prefetching as many bytes as it reads.
void add_weighted_sums_amx(const float* weights, int lanes, int rows, const Table& table,
                           int tokens, float* sums, Prefetcher prefetcher,
                           bool bf16_weights = false);

}  // namespace nabla_fast::gemm

#endif  // NABLA_FAST_CPU_GEMM_AMX_H_
