#include "internal/decoder.h"

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>

#include "base/isa.h"
#include "simd/lanes.h"
#include "simd/vec_exp.h"

namespace nabla_fast::internal {
namespace {

// -- element by element ---------------------------------------------------------------------------

// unit = x / rms and y = unit * weight, row by row; row r takes weight row r mod weight_rows.
NABLA_FAST_INLINE void norm_rows_kernel(const float* x, int64_t x_stride, int64_t rows,
                                        int64_t width, const float* weight, int64_t weight_rows,
                                        float eps, float* unit, float* inverse, float* y,
                                        int64_t y_stride) {
  for (int64_t r = 0; r < rows; ++r) {
    const float* row = x + r * x_stride;
    Lanes squares = {};
    for (int64_t k = 0; k < width; k += kLanes) squares += load(row + k) * load(row + k);
    float scale = 1 / std::sqrt(lane_sum<kLanes>(squares) / static_cast<float>(width) + eps);
    inverse[r] = scale;
    const float* w = weight + r % weight_rows * width;
    for (int64_t k = 0; k < width; k += kLanes) {
      Lanes scaled = load(row + k) * scale;
      store(unit + r * width + k, scaled);
      store(y + r * y_stride + k, scaled * load(w + k));
    }
  }
}
NABLA_FAST_FOR_EACH_ISA(norm_rows, norm_rows_kernel)

// dx = or += (g - unit mean(g unit)) / rms with g = dy weight; dy may be dx.
NABLA_FAST_INLINE void norm_backward_kernel(const float* dy, int64_t dy_stride, int64_t rows,
                                            int64_t width, const float* weight, int64_t weight_rows,
                                            const float* unit, const float* inverse, float* dx,
                                            int64_t dx_stride, bool add) {
  for (int64_t r = 0; r < rows; ++r) {
    const float *d = dy + r * dy_stride, *w = weight + r % weight_rows * width,
                *u = unit + r * width;
    Lanes products = {};
    for (int64_t k = 0; k < width; k += kLanes) products += load(d + k) * load(w + k) * load(u + k);
    float mean = lane_sum<kLanes>(products) / static_cast<float>(width);
    float* out = dx + r * dx_stride;
    for (int64_t k = 0; k < width; k += kLanes) {
      Lanes gradient = (load(d + k) * load(w + k) - load(u + k) * mean) * inverse[r];
      store(out + k, add ? load(out + k) + gradient : gradient);
    }
  }
}
NABLA_FAST_FOR_EACH_ISA(norm_backward, norm_backward_kernel)

// x = x cos + swapped halves of x * sin, for the first `heads` heads of each token, in place.
// Backward: x = x cos + swapped halves of (x * sin).
NABLA_FAST_INLINE void rotate_kernel(float* x, int64_t stride, int64_t tokens, int64_t heads,
                                     int64_t dim, const float* cos, const float* sin,
                                     bool backward) {
  int64_t half = dim / 2;
  for (int64_t t = 0; t < tokens; ++t) {
    const float *c = cos + t * dim, *s = sin + t * dim;
    for (int64_t h = 0; h < heads; ++h) {
      float *low = x + t * stride + h * dim, *high = low + half;
      for (int64_t k = 0; k < half; ++k) {
        float a = low[k], b = high[k];
        // The table's sine carries the sign of the half it is multiplied into.
        low[k] = a * c[k] + b * (backward ? s[k + half] : s[k]);
        high[k] = b * c[k + half] + a * (backward ? s[k] : s[k + half]);
      }
    }
  }
}
NABLA_FAST_FOR_EACH_ISA(rotate, rotate_kernel)

NABLA_FAST_INLINE float sigmoid(float x) { return 1 / (1 + vec_exp(-x)); }

// product = silu(gate) * up.
NABLA_FAST_INLINE void gated_kernel(const float* gate, const float* up, float* product,
                                    int64_t count) {
  for (int64_t n = 0; n < count; ++n) product[n] = gate[n] * sigmoid(gate[n]) * up[n];
}
NABLA_FAST_FOR_EACH_ISA(gated, gated_kernel)

// Gradients of gate and up from the product's, which may stand where the gate's goes.
NABLA_FAST_INLINE void gated_backward_kernel(const float* d_product, const float* gate,
                                             const float* up, float* d_gate, float* d_up,
                                             int64_t count) {
  for (int64_t n = 0; n < count; ++n) {
    float d = d_product[n], g = gate[n], s = sigmoid(g);
    d_gate[n] = d * up[n] * (s * (1 + g * (1 - s)));
    d_up[n] = d * (g * s);
  }
}
NABLA_FAST_FOR_EACH_ISA(gated_backward, gated_backward_kernel)

// -- memory ---------------------------------------------------------------------------------------

// Activations kept of a layer, or of the current layer alone.
struct Kept {
  float *unit, *inverse;        // of the norm before attention: [T, width], [T]
  float* qkv;                   // [T, heads + 2 kv_heads, dim]
  float *qk_unit, *qk_inverse;  // of the norm of queries and keys: [T, heads + kv_heads, dim], ..
  float *mlp_unit, *mlp_inverse;
  float *gate, *up;  // [T, inner]

  static int64_t floats(const Decoder& d, int64_t tokens) {
    int64_t normed = d.heads + d.kv_heads;
    return tokens * (2 * (d.width + 1) + d.qkv() + normed * (d.dim + 1) + 2 * d.inner);
  }

  Kept(const Decoder& d, int64_t tokens, float* memory) {
    auto take = [&](int64_t count) {
      float* part = memory;
      memory += count;
      return part;
    };
    int64_t normed = tokens * (d.heads + d.kv_heads);
    unit = take(tokens * d.width);
    qkv = take(tokens * d.qkv());
    qk_unit = take(normed * d.dim);
    mlp_unit = take(tokens * d.width);
    gate = take(tokens * d.inner);
    up = take(tokens * d.inner);
    inverse = take(tokens);
    mlp_inverse = take(tokens);
    qk_inverse = take(normed);
  }
};

// Memory that no part of a pass leaves to another.
struct Scratch {
  float *normed, *attended, *product, *other;

  static int64_t floats(const Decoder& d, int64_t tokens) {
    return tokens * (2 * d.width + d.heads * d.dim + 2 * d.inner);
  }

  Scratch(const Decoder& d, int64_t tokens, float* memory)
      : normed(memory),
        attended(normed + tokens * 2 * d.width),
        product(attended + tokens * d.heads * d.dim),
        other(product + tokens * d.inner) {}
};

// Scratch, the last norm's unit rows and their factors, then what is kept of the layers.
Scratch scratch_of(const Decoder& d, const DecoderPass& p) { return {d, p.count(), p.memory}; }

float* last_unit(const Decoder& d, const DecoderPass& p) {
  return p.memory + Scratch::floats(d, p.count());
}

Kept kept_of(const Decoder& d, const DecoderPass& p, int64_t layer) {
  float* first = last_unit(d, p) + p.count() * (d.width + 1);
  return {d, p.count(), first + (p.keep ? layer * Kept::floats(d, p.count()) : 0)};
}

nabla_fast_attention_args attention_of(const Decoder& d, const DecoderPass& p, int64_t layer,
                                       const float* qkv, float* output) {
  int64_t row = d.qkv(), token = d.kv_heads * d.dim, block = p.block_size * token;
  int64_t q_width = d.heads * d.dim, of_layer = layer * p.blocks * block;
  const auto heads = [&](const float* data) {
    return nabla_fast_heads{data, p.suffix * row, d.dim, row};
  };
  nabla_fast_attention_args a{};
  a.size = sizeof(a);
  a.num_threads = p.num_threads;
  a.batch = p.batch;
  a.heads = d.heads;
  a.kv_heads = d.kv_heads;
  a.suffix = p.suffix;
  a.dim = d.dim;
  a.blocks = p.blocks;
  a.block_size = p.block_size;
  a.table_width = p.table_width;
  a.window = d.layers[static_cast<size_t>(layer)].window;
  a.scale = d.layers[static_cast<size_t>(layer)].scale;
  a.q = heads(qkv);
  a.k = heads(qkv + q_width);
  a.v = heads(qkv + q_width + token);
  a.key_pool = {p.key_pool + of_layer, block, token, d.dim};
  a.value_pool = {p.value_pool + of_layer, block, token, d.dim};
  a.block_tables = p.block_tables;
  a.prefix_lengths = p.prefix_lengths;
  a.table_stride = p.table_width;
  a.output = {output, p.suffix * q_width, d.dim, q_width};
  return a;
}

void store_keys(const Decoder& d, const DecoderPass& p, int64_t layer, const float* qkv) {
  int64_t size = d.kv_heads * d.dim, layer_size = p.blocks * p.block_size * size;
  for (int64_t t = 0; t < p.count(); ++t) {
    if (p.slots[t] < 0) continue;
    const float* keys = qkv + t * d.qkv() + d.heads * d.dim;
    int64_t place = layer * layer_size + p.slots[t] * size;
    std::memcpy(p.key_pool + place, keys, sizeof(float) * static_cast<size_t>(size));
    std::memcpy(p.value_pool + place, keys + size, sizeof(float) * static_cast<size_t>(size));
  }
}

}  // namespace

int64_t decoder_memory(const Decoder& d, int64_t tokens, bool keep) {
  int64_t layers = keep ? static_cast<int64_t>(d.layers.size()) : 1;
  return Scratch::floats(d, tokens) + tokens * (d.width + 1) + layers * Kept::floats(d, tokens);
}

nabla_fast_status decoder_forward(const Decoder& d, const DecoderPass& p) {
  int64_t count = p.count(), width = d.width, row = d.qkv();
  int64_t q_width = d.heads * d.dim, kv_width = d.kv_heads * d.dim, normed = d.heads + d.kv_heads;
  Scratch scratch = scratch_of(d, p);
  for (size_t n = 0; n < d.layers.size(); ++n) {
    const DecoderLayer& layer = d.layers[n];
    int64_t index = static_cast<int64_t>(n);
    Kept kept = kept_of(d, p, index);
    norm_rows(p.x, width, count, width, layer.attention_norm, 1, layer.attention_eps, kept.unit,
              kept.inverse, scratch.normed, width);
    linear(scratch.normed, width, count, p.suffix, layer.q, d.weights, {q_width, width}, kept.qkv,
           row, p.num_threads);
    linear(scratch.normed, width, count, p.suffix, layer.k, d.weights, {kv_width, width},
           kept.qkv + q_width, row, p.num_threads);
    linear(scratch.normed, width, count, p.suffix, layer.v, d.weights, {kv_width, width},
           kept.qkv + q_width + kv_width, row, p.num_threads);
    if (layer.qk_norm) {
      for (int64_t t = 0; t < count; ++t)
        norm_rows(kept.qkv + t * row, d.dim, normed, d.dim, layer.qk_norm, normed, layer.qk_eps,
                  kept.qk_unit + t * normed * d.dim, kept.qk_inverse + t * normed,
                  kept.qkv + t * row, d.dim);
    }
    rotate(kept.qkv, row, count, normed, d.dim, p.cos, p.sin, false);
    nabla_fast_attention_args attention = attention_of(d, p, index, kept.qkv, scratch.attended);
    nabla_fast_status status = nabla_fast_prefix_attention(&attention);
    if (status != NABLA_FAST_OK) return status;
    if (p.slots) store_keys(d, p, index, kept.qkv);
    linear(scratch.attended, q_width, count, p.suffix, layer.output, d.weights, {width, q_width},
           scratch.normed, width, p.num_threads);
    for (int64_t k = 0; k < count * width; ++k) p.x[k] += scratch.normed[k];
    norm_rows(p.x, width, count, width, layer.mlp_norm, 1, layer.mlp_eps, kept.mlp_unit,
              kept.mlp_inverse, scratch.normed, width);
    linear(scratch.normed, width, count, p.suffix, layer.gate, d.weights, {d.inner, width},
           kept.gate, d.inner, p.num_threads);
    linear(scratch.normed, width, count, p.suffix, layer.up, d.weights, {d.inner, width}, kept.up,
           d.inner, p.num_threads);
    gated(kept.gate, kept.up, scratch.product, count * d.inner);
    linear(scratch.product, d.inner, count, p.suffix, layer.down, d.weights, {width, d.inner},
           scratch.normed, width, p.num_threads);
    for (int64_t k = 0; k < count * width; ++k) p.x[k] += scratch.normed[k];
  }
  float* unit = last_unit(d, p);
  norm_rows(p.x, width, count, width, d.norm, 1, d.eps, unit, unit + count * width, p.states,
            width);
  return NABLA_FAST_OK;
}

void decoder_backward_norm(const Decoder& d, const DecoderPass& p, float* dx) {
  int64_t count = p.count();
  float* unit = last_unit(d, p);
  norm_backward(dx, d.width, count, d.width, d.norm, 1, unit, unit + count * d.width, dx, d.width,
                false);
}

void decoder_backward_mlp(const Decoder& d, const DecoderPass& p, int64_t index, float* dx,
                          float* d_attended) {
  const DecoderLayer& layer = d.layers[static_cast<size_t>(index)];
  int64_t count = p.count(), width = d.width, q_width = d.heads * d.dim;
  Scratch scratch = scratch_of(d, p);
  Kept kept = kept_of(d, p, index);
  float *d_gate = scratch.product, *d_up = scratch.other, *d_normed = scratch.normed;
  std::fill_n(d_gate, count * d.inner, 0.0f);
  linear_backward(dx, width, count, layer.down, d.weights, {width, d.inner}, d_gate, p.num_threads);
  gated_backward(d_gate, kept.gate, kept.up, d_gate, d_up, count * d.inner);
  std::fill_n(d_normed, count * width, 0.0f);
  linear_backward(d_gate, d.inner, count, layer.gate, d.weights, {d.inner, width}, d_normed,
                  p.num_threads);
  linear_backward(d_up, d.inner, count, layer.up, d.weights, {d.inner, width}, d_normed,
                  p.num_threads);
  norm_backward(d_normed, width, count, width, layer.mlp_norm, 1, kept.mlp_unit, kept.mlp_inverse,
                dx, width, true);
  std::fill_n(d_attended, count * q_width, 0.0f);
  linear_backward(dx, width, count, layer.output, d.weights, {width, q_width}, d_attended,
                  p.num_threads);
}

void decoder_backward_qkv(const Decoder& d, const DecoderPass& p, int64_t index, float* d_qkv,
                          float* dx) {
  const DecoderLayer& layer = d.layers[static_cast<size_t>(index)];
  int64_t count = p.count(), width = d.width, row = d.qkv(), normed = d.heads + d.kv_heads;
  int64_t q_width = d.heads * d.dim, kv_width = d.kv_heads * d.dim;
  Kept kept = kept_of(d, p, index);
  float* d_normed = scratch_of(d, p).normed;
  rotate(d_qkv, row, count, normed, d.dim, p.cos, p.sin, true);
  if (layer.qk_norm) {
    for (int64_t t = 0; t < count; ++t)
      norm_backward(d_qkv + t * row, d.dim, normed, d.dim, layer.qk_norm, normed,
                    kept.qk_unit + t * normed * d.dim, kept.qk_inverse + t * normed,
                    d_qkv + t * row, d.dim, false);
  }
  std::fill_n(d_normed, count * width, 0.0f);
  linear_backward(d_qkv, row, count, layer.q, d.weights, {q_width, width}, d_normed, p.num_threads);
  linear_backward(d_qkv + q_width, row, count, layer.k, d.weights, {kv_width, width}, d_normed,
                  p.num_threads);
  linear_backward(d_qkv + q_width + kv_width, row, count, layer.v, d.weights, {kv_width, width},
                  d_normed, p.num_threads);
  norm_backward(d_normed, width, count, width, layer.attention_norm, 1, kept.unit, kept.inverse, dx,
                width, true);
}

float* decoder_qkv(const Decoder& d, const DecoderPass& p, int64_t layer) {
  return kept_of(d, p, layer).qkv;
}

}  // namespace nabla_fast::internal
