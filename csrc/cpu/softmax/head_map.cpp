#include "softmax/head_map.h"

#include <cstdint>

#include "base/isa.h"

namespace nabla_fast::softmax {
namespace {

NABLA_FAST_FOR_EACH_ISA(map_tile_variants, map_tile_kernel<W>)

}  // namespace

void map_tile(const HeadMap& map, int64_t token, int tokens, int lanes, float* tile, float* slope) {
  map_tile_variants(map, token, tokens, lanes, tile, slope);
}

}  // namespace nabla_fast::softmax
