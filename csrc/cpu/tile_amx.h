// products() with bf16 tables on the CPU's matrix unit (Intel AMX), which multiplies tiles of 16 x 32
// bf16 and adds up in fp32.
#ifndef NABLA_FAST_CPU_TILE_AMX_H_
#define NABLA_FAST_CPU_TILE_AMX_H_

#include "tiles.h"

namespace nabla_fast::cpu {

// Whether this process may use the unit. Asks the system for it, once.
bool has_amx();

// Rows as the unit takes them: [(width + 31) / 32 * 16, terms, lanes] of pairs of bf16, zeros behind
// the width. A float32 is the sum of three bf16 terms, exactly.
void pack_amx(const Table& from, int rows, int lanes, int terms, void* packed);

// products(), of rows that pack_amx() packed and a table of bf16.
void products_amx(const PackedRows& rows, const Table& table, int tokens, bool add, float* z);

}  // namespace nabla_fast::cpu

#endif  // NABLA_FAST_CPU_TILE_AMX_H_
