// Suffixes of sequences through a Llama-type decoder in one call: what a token of a small model
// costs in Python is many times its arithmetic. Inside the package only. Linear layers' weights are
// float32, bf16 or fp16; everything else, keys and values of a pool among it, is float32.
#ifndef NABLA_FAST_CPU_INTERNAL_DECODER_H_
#define NABLA_FAST_CPU_INTERNAL_DECODER_H_

#include <cstdint>
#include <vector>

#include "internal/linear_layers.h"
#include "nabla_fast.h"

namespace nabla_fast::internal {

struct DecoderLayer {
  const float* attention_norm;  // [width]
  Linear q, k, v;
  const float* qk_norm;  // [heads + kv_heads, dim] or null
  Linear output;
  const float* mlp_norm;  // [width]
  Linear gate, up, down;
  float attention_eps, qk_eps, mlp_eps;
  double scale;
  int64_t window;  // 0: none
};

struct Decoder {
  int64_t width, heads, kv_heads, dim, inner;
  WeightType weights;  // of all linear layers
  std::vector<DecoderLayer> layers;
  const float* norm;  // [width]
  float eps;

  int64_t qkv() const { return (heads + 2 * kv_heads) * dim; }
};

// Arrays of a pass; T = batch * suffix tokens, padding among them.
struct DecoderPass {
  int64_t batch, suffix;
  float* x;          // [T, width] embeddings, overwritten
  const float* cos;  // [T, dim]
  const float* sin;  // [T, dim], the first half negative
  float* key_pool;   // [layers, blocks, block_size, kv_heads, dim]
  float* value_pool;
  int64_t blocks, block_size;
  const int64_t* block_tables;  // [batch, table_width]
  int64_t table_width;
  const int64_t* prefix_lengths;  // [batch]
  const int64_t* slots;           // [T] where keys and values go, -1: nowhere; null for all nowhere
  float* memory;                  // decoder_memory() floats
  bool keep;                      // what the backward needs, of every layer
  float* states;                  // [T, width] after the last norm
  int32_t num_threads;

  int64_t count() const { return batch * suffix; }
};

// Floats that a pass over `tokens` tokens works in; with `keep`, all that its backward reads and
// writes.
int64_t decoder_memory(const Decoder& decoder, int64_t tokens, bool keep);

nabla_fast_status decoder_forward(const Decoder& decoder, const DecoderPass& pass);

// The backward of a pass in parts, with the attention's own between them; dx [T, width] is the
// gradient of the residual stream, changed in place.

// The last norm: dx becomes the gradient before it.
void decoder_backward_norm(const Decoder& decoder, const DecoderPass& pass, float* dx);

// A layer's MLP and output projection; d_attended [T, heads * dim].
void decoder_backward_mlp(const Decoder& decoder, const DecoderPass& pass, int64_t layer, float* dx,
                          float* d_attended);

// A layer's projections to queries, keys and values: d_qkv [T, heads + 2 kv_heads, dim],
// overwritten.
void decoder_backward_qkv(const Decoder& decoder, const DecoderPass& pass, int64_t layer,
                          float* d_qkv, float* dx);

// A kept layer's queries, keys and values [T, heads + 2 kv_heads, dim] as attention saw them.
float* decoder_qkv(const Decoder& decoder, const DecoderPass& pass, int64_t layer);

}  // namespace nabla_fast::internal

#endif  // NABLA_FAST_CPU_INTERNAL_DECODER_H_
