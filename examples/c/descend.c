/* Logits of three rows descend until their hard token moves: once by the library, once here, in
 * double and in the plainest way. */
#include "descend.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>

enum { ROWS = 3, VOCAB = 1003, STRIDE = 1010, ITERS = 20 };

static const double TAU = 0.7;

/* Numbers in [-1, 1), the same ones everywhere. */
static double random_number(void) {
  static uint64_t state = 1;
  state = state * 6364136223846793005u + 1442695040888963407u;
  return (double)(state >> 33) / 1073741824.0 - 1;
}

static int64_t argmax(const double* z) {
  int64_t best = 0, v;
  for (v = 1; v < VOCAB; ++v)
    if (z[v] > z[best]) best = v;
  return best;
}

/* Steps taken. */
static int64_t reference(double* z, const float* grad, const double* schedule) {
  double m[VOCAB] = {0}, s[VOCAB] = {0}, p[VOCAB];
  const int64_t token = argmax(z);
  int64_t step, v;
  for (step = 0; step < ITERS && argmax(z) == token; ++step) {
    const double top = z[token];
    double sum = 0, mean = 0;
    for (v = 0; v < VOCAB; ++v) sum += p[v] = exp((z[v] - top) / TAU);
    for (v = 0; v < VOCAB; ++v) mean += (p[v] /= sum) * grad[v];
    for (v = 0; v < VOCAB; ++v) {
      const double g = p[v] * (grad[v] - mean) / TAU;
      const double first = 1 - pow(0.9, (double)(step + 1));
      const double second = 1 - pow(0.999, (double)(step + 1));
      m[v] = 0.9 * m[v] + 0.1 * g;
      s[v] = 0.999 * s[v] + 0.001 * g * g;
      z[v] -= schedule[step] * (m[v] / first) / (sqrt(s[v] / second) + 1e-8);
    }
  }
  return step;
}

static int fail(const char* what, double ours, double theirs) {
  fprintf(stderr, "%s: %.9g, expected %.9g\n", what, ours, theirs);
  return 1;
}

int descend(const struct functions* nabla_fast) {
  static float z[ROWS * STRIDE], grad[ROWS * STRIDE], m[ROWS * STRIDE], s[ROWS * STRIDE];
  static double expected[ROWS][VOCAB];
  double schedule[ITERS], error = 0;
  int64_t step[ROWS] = {0}, token[ROWS], row, v, bytes;
  uint8_t flipped[ROWS];
  nabla_fast_status row_status[ROWS], status;
  /* What is not named is 0. */
  nabla_fast_descent_args args = {
      .size = sizeof args,
      .num_threads = 1,
      .rows = ROWS,
      .vocab = VOCAB,
      .parameter = {z, VOCAB, STRIDE, NABLA_FAST_FLOAT32},
      .exp_avg = {m, VOCAB, STRIDE, NABLA_FAST_FLOAT32},
      .exp_avg_sq = {s, VOCAB, STRIDE, NABLA_FAST_FLOAT32},
      .step = step,
      .grad = {grad, VOCAB, STRIDE, NABLA_FAST_FLOAT32},
      .schedule = schedule,
      .iters = ITERS,
      .tau = TAU,
      .token = token,
      .flipped = flipped,
      .row_status = row_status,
  };
  int moved = 0;

  if (nabla_fast->abi_version() != NABLA_FAST_ABI_VERSION)
    return fail("ABI version", nabla_fast->abi_version(), NABLA_FAST_ABI_VERSION);

  for (v = 0; v < ITERS; ++v) schedule[v] = 0.05 * (1 - 0.5 * (double)v / ITERS);
  for (row = 0; row < ROWS; ++row) {
    for (v = 0; v < VOCAB; ++v) {
      const double g = random_number();
      /* Where G is close to its mean, Adam divides one rounding error by another. */
      grad[row * STRIDE + v] = (float)(g < 0 ? g - 0.5 : g + 0.5);
      z[row * STRIDE + v] = (float)(3 * random_number());
    }
    /* The hard token leads by more in each row, and its gradient says that it should not. */
    z[row * STRIDE + 17 * row] = 3.0f + 0.9f * (float)row;
    grad[row * STRIDE + 17 * row] = 2.0f;
    for (v = 0; v < VOCAB; ++v) expected[row][v] = z[row * STRIDE + v];
  }

  bytes = nabla_fast->workspace(&args);
  args.workspace = malloc((size_t)bytes);
  /* Too small a workspace is refused, and nothing has happened. */
  args.workspace_bytes = bytes - 1;
  status = nabla_fast->descent(&args);
  if (status != NABLA_FAST_WORKSPACE_TOO_SMALL)
    return fail("status of a small workspace", status, NABLA_FAST_WORKSPACE_TOO_SMALL);
  args.workspace_bytes = bytes;
  status = nabla_fast->descent(&args);
  free(args.workspace);
  if (status != NABLA_FAST_OK) {
    fprintf(stderr, "nabla_fast_dto_descent: %s\n", nabla_fast->status_string(status));
    return 1;
  }

  for (row = 0; row < ROWS; ++row) {
    const int64_t before = argmax(expected[row]);
    const int64_t steps = reference(expected[row], grad + row * STRIDE, schedule);
    const int64_t now = argmax(expected[row]);
    if (step[row] != steps) return fail("steps", (double)step[row], (double)steps);
    if (token[row] != now) return fail("token", (double)token[row], (double)now);
    if (flipped[row] != (now != before)) return fail("flipped", flipped[row], now != before);
    if (row_status[row] != NABLA_FAST_OK) return fail("row status", row_status[row], 0);
    moved += flipped[row];
    for (v = 0; v < VOCAB; ++v) {
      const double here = fabs(z[row * STRIDE + v] - expected[row][v]);
      error = here > error || here != here ? here : error;
    }
    for (v = VOCAB; v < STRIDE; ++v)
      if (z[row * STRIDE + v] != 0) return fail("behind a row", z[row * STRIDE + v], 0);
  }
  /* Else the comparison would not be of what it seems. */
  if (moved == 0 || moved == ROWS) return fail("rows whose token moved", moved, 2);
  /* A logit of magnitude 4 is known to 2.4e-7; twenty roundings and some arithmetic. */
  if (!(error < 5e-6)) return fail("largest error of a logit", error, 0);
  printf("%d rows of %d logits, %d tokens moved, largest error %.1e\n", ROWS, VOCAB, moved, error);
  return 0;
}
