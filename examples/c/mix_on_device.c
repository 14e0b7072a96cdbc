/* A soft mix and its backward on a CUDA device, without Python or torch: rows of logits pick embeddings,
 * and a gradient comes back to the logits. Both are compared with the same in double.
 *
 * cc mix_on_device.c $(pkg-config --cflags --libs nabla_fast_cuda) -lcudart -lm */
#include <cuda_runtime_api.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>

#include "nabla_fast_cuda.h"

enum { ROWS = 3, VOCAB = 1000, WIDTH = 16 };

static const double TAU = 0.7;

static float logits[ROWS][VOCAB], table[VOCAB][WIDTH], cotangent[ROWS][WIDTH];
static float mix[ROWS][WIDTH], grad[ROWS][VOCAB];

static void check(cudaError_t error) {
  if (error == cudaSuccess) return;
  fprintf(stderr, "CUDA: %s\n", cudaGetErrorString(error));
  exit(1);
}

static void answered(nabla_fast_status status) {
  if (status == NABLA_FAST_OK) return;
  fprintf(stderr, "nabla_fast: %s\n", nabla_fast_status_string(status));
  exit(1);
}

static void* on_device(size_t bytes, const void* content) {
  void* memory;
  check(cudaMalloc(&memory, bytes));
  if (content) check(cudaMemcpy(memory, content, bytes, cudaMemcpyHostToDevice));
  return memory;
}

/* Numbers in [-1, 1), the same ones everywhere. */
static float random_number(void) {
  static uint64_t state = 1;
  state = state * 6364136223846793005u + 1442695040888963407u;
  return (float)((double)(state >> 33) / 1073741824.0 - 1);
}

static void fill(float* numbers, int count, float scale) {
  int n;
  for (n = 0; n < count; ++n) numbers[n] = scale * random_number();
}

/* The largest differences from the same in double. */
static void compare(double* of_mix, double* of_grad) {
  double p[VOCAB], g[VOCAB];
  int row, v, k;
  for (row = 0; row < ROWS; ++row) {
    double top = logits[row][0], sum = 0, mean = 0;
    for (v = 1; v < VOCAB; ++v) top = fmax(top, logits[row][v]);
    for (v = 0; v < VOCAB; ++v) sum += p[v] = exp((logits[row][v] - top) / TAU);
    for (v = 0; v < VOCAB; ++v) {
      p[v] /= sum;
      g[v] = 0;
      for (k = 0; k < WIDTH; ++k) g[v] += (double)table[v][k] * cotangent[row][k];
      mean += p[v] * g[v];
    }
    for (k = 0; k < WIDTH; ++k) {
      double expected = 0;
      for (v = 0; v < VOCAB; ++v) expected += p[v] * table[v][k];
      *of_mix = fmax(*of_mix, fabs(mix[row][k] - expected));
    }
    for (v = 0; v < VOCAB; ++v)
      *of_grad = fmax(*of_grad, fabs(grad[row][v] - p[v] * (g[v] - mean) / TAU));
  }
}

int main(void) {
  double of_mix = 0, of_grad = 0;
  cudaStream_t stream;
  nabla_fast_status row_status[ROWS];
  nabla_fast_matrix tables, cotangents;
  nabla_fast_output mixes;
  nabla_fast_mix_args args = {0};
  int64_t forward, backward;
  int row;

  fill(logits[0], ROWS * VOCAB, 5);
  fill(table[0], VOCAB * WIDTH, 1);
  fill(cotangent[0], ROWS * WIDTH, 1);
  check(cudaStreamCreate(&stream));

  /* What matrices point to is the device's; the struct and the arrays of matrices are the host's. */
  tables.data = on_device(sizeof table, table);
  tables.width = tables.stride = WIDTH;
  tables.dtype = NABLA_FAST_FLOAT32;
  cotangents = tables;
  cotangents.data = on_device(sizeof cotangent, cotangent);
  mixes.data = on_device(sizeof mix, NULL);
  mixes.width = mixes.stride = WIDTH;
  mixes.dtype = NABLA_FAST_FLOAT32;
  args.size = sizeof args;
  args.rows = ROWS;
  args.vocab = VOCAB;
  args.logits.data = on_device(sizeof logits, logits);
  args.logits.width = args.logits.stride = VOCAB;
  args.logits.dtype = NABLA_FAST_FLOAT32;
  args.tau = TAU;
  args.table_count = 1;
  args.tables = &tables;
  args.mixes = &mixes;
  args.cotangents = &cotangents;
  args.grad.data = on_device(sizeof grad, NULL);
  args.grad.width = args.grad.stride = VOCAB;
  args.grad.dtype = NABLA_FAST_FLOAT32;
  args.row_status = on_device(sizeof row_status, NULL);

  /* One workspace for both, which run one after the other. */
  forward = nabla_fast_cuda_embedding_mix_workspace(&args);
  backward = nabla_fast_cuda_embedding_mix_backward_workspace(&args);
  args.workspace_bytes = forward > backward ? forward : backward;
  args.workspace = on_device((size_t)args.workspace_bytes, NULL);
  answered(nabla_fast_cuda_embedding_mix(&args, stream));
  answered(nabla_fast_cuda_embedding_mix_backward(&args, stream));
  check(cudaStreamSynchronize(stream));

  check(cudaMemcpy(row_status, args.row_status, sizeof row_status, cudaMemcpyDeviceToHost));
  check(cudaMemcpy(mix, mixes.data, sizeof mix, cudaMemcpyDeviceToHost));
  check(cudaMemcpy(grad, args.grad.data, sizeof grad, cudaMemcpyDeviceToHost));
  for (row = 0; row < ROWS; ++row) answered(row_status[row]);
  compare(&of_mix, &of_grad);
  printf("%d rows of %d logits, largest error %.1e of the mix, %.1e of the gradient\n", ROWS, VOCAB,
         of_mix, of_grad);
  return of_mix < 1e-5 && of_grad < 1e-5 ? 0 : 1;
}
