// Calls of the CUDA kernels whose arrays have their own allocations, for sanitizers: small mixes and
// their backward, with every dtype of logits, tables and results, and rows that lie apart; descents of
// rows that blocks share in every way, and on hidden states under heads of every dtype.

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <random>
#include <vector>

#include "host/control.h"
#include "nabla_fast_cuda.h"

namespace {

std::mt19937_64 numbers(1);

[[noreturn]] void fail(const char* what, int status) {
  std::fprintf(stderr, "%s: %d\n%s", what, status, nabla_fast_host_reports());
  std::exit(1);
}

// Calls a function with a workspace of its own; all rows have to be good.
template <typename Args, typename Function>
void run(const char* name, Args& args, int64_t bytes, Function* function) {
  const auto workspace = std::make_unique<char[]>(static_cast<size_t>(bytes));
  args.workspace = workspace.get();
  args.workspace_bytes = bytes;
  if (const auto answer = function(&args, nullptr)) fail(name, answer);
  for (int64_t row = 0; row < args.rows; ++row)
    if (args.row_status[row] != NABLA_FAST_OK) fail(name, args.row_status[row]);
}

// Rows with a gap of some elements between them, and nothing behind the last.
class Matrix {
 public:
  Matrix(int64_t rows, int64_t width, int64_t gap, nabla_fast_dtype dtype)
      : stride_(width + gap), width_(width), dtype_(dtype) {
    const int64_t elements = rows > 0 ? (rows - 1) * stride_ + width : 0;
    bytes_.resize(static_cast<size_t>(elements * (dtype == NABLA_FAST_FLOAT32 ? 4 : 2)));
    for (size_t n = 0; n < bytes_.size(); ++n) {
      // An element's upper byte makes it a number between 1/8 and 2, of either sign.
      const bool upper = n % (dtype == NABLA_FAST_FLOAT32 ? 4 : 2) == (dtype ? 1 : 3);
      const auto random = static_cast<uint8_t>(numbers());
      bytes_[n] = upper ? static_cast<uint8_t>((random & 0x81) | 0x3E) : random;
    }
  }

  nabla_fast_matrix read() const { return {bytes_.data(), width_, stride_, dtype_}; }
  nabla_fast_output written() { return {bytes_.data(), width_, stride_, dtype_}; }

 private:
  std::vector<uint8_t> bytes_;
  int64_t stride_, width_;
  nabla_fast_dtype dtype_;
};

void mix(int64_t rows, int64_t vocab, nabla_fast_dtype logits, nabla_fast_dtype tables,
         nabla_fast_dtype results, bool noise, bool linear) {
  const int64_t gap = static_cast<int64_t>(numbers() % 3);
  const int64_t widths[] = {5, 67};
  std::vector<int64_t> seed(static_cast<size_t>(rows), -7), position(seed);
  std::vector<nabla_fast_status> status(static_cast<size_t>(rows));
  const Matrix z(rows, vocab, gap, logits), direct(rows, vocab, gap, tables);
  const Matrix table0(vocab, widths[0], gap, tables), table1(vocab, widths[1], gap, results);
  const Matrix state0(rows, widths[0], gap, results), state1(rows, widths[1], gap, tables);
  Matrix mix0(rows, widths[0], gap, results), mix1(rows, widths[1], gap, results);
  const Matrix hidden(rows, 9, gap, logits), head(vocab, 9, gap, tables);
  Matrix grad(rows, linear ? 9 : vocab, gap, linear ? 0 : logits);
  const nabla_fast_matrix all_tables[] = {table0.read(), table1.read()};
  const nabla_fast_matrix all_states[] = {state0.read(), state1.read()};
  const nabla_fast_output all_mixes[] = {mix0.written(), mix1.written()};

  nabla_fast_mix_args args = {};
  args.size = sizeof args;
  args.rows = rows;
  args.vocab = vocab;
  if (linear) {
    args.hidden = hidden.read();
    args.head = head.read();
  } else {
    args.logits = z.read();
  }
  args.tau = 0.7;
  if (noise) {
    args.noise_seed = seed.data();
    args.noise_position = position.data();
  }
  args.table_count = 2;
  args.tables = all_tables;
  args.row_status = status.data();
  args.mixes = all_mixes;
  args.cotangents = all_states;
  args.direct = direct.read();
  args.grad = grad.written();
  for (args.hard = 0; args.hard < 2; ++args.hard)
    run("embedding_mix", args, nabla_fast_cuda_embedding_mix_workspace(&args),
        nabla_fast_cuda_embedding_mix);
  run("embedding_mix_backward", args, nabla_fast_cuda_embedding_mix_backward_workspace(&args),
      nabla_fast_cuda_embedding_mix_backward);
}

// width: of hidden states, 0 for logits.
void descend(int64_t rows, int64_t vocab, bool noise, bool groups, int64_t width = 0,
             nabla_fast_dtype dtype = NABLA_FAST_FLOAT32) {
  const int64_t columns = width > 0 ? width : vocab;
  const int64_t gap = static_cast<int64_t>(numbers() % 3);
  const auto count = static_cast<size_t>(rows);
  Matrix z(rows, columns, gap, NABLA_FAST_FLOAT32), m(rows, columns, gap, NABLA_FAST_FLOAT32);
  // Of zeros: second moments are not negative.
  std::vector<float> v(static_cast<size_t>(rows * columns));
  const Matrix head(vocab, width, gap, dtype);
  const Matrix grad(rows, vocab, gap, NABLA_FAST_FLOAT32);
  std::vector<int64_t> key(count, 5), step(count, 1), until(count, 3), group(count), token(count);
  std::vector<uint8_t> flipped(count);
  std::vector<nabla_fast_status> status(count);
  const std::vector<double> schedule(4, 0.01);

  nabla_fast_descent_args args = {};
  args.size = sizeof args;
  args.rows = rows;
  args.vocab = vocab;
  args.parameter = z.written();
  args.exp_avg = m.written();
  args.exp_avg_sq = {v.data(), columns, columns, NABLA_FAST_FLOAT32};
  if (width > 0) args.head = head.read();
  args.step = step.data();
  args.grad = grad.read();
  args.schedule = schedule.data();
  args.iters = static_cast<int64_t>(schedule.size());
  args.until = until.data();
  args.group = groups ? group.data() : nullptr;
  args.tau = 0.7;
  args.noise_seed = args.noise_position = noise ? key.data() : nullptr;
  args.token = token.data();
  args.flipped = flipped.data();
  args.row_status = status.data();
  if (width > 0)
    run("dto_descent_latents", args, nabla_fast_cuda_dto_descent_latents_workspace(&args),
        nabla_fast_cuda_dto_descent_latents);
  else
    run("dto_descent", args, nabla_fast_cuda_dto_descent_workspace(&args),
        nabla_fast_cuda_dto_descent);
}

}  // namespace

int main() {
  nabla_fast_host_configure(1, 90);
  const nabla_fast_dtype dtypes[] = {NABLA_FAST_FLOAT32, NABLA_FAST_BFLOAT16, NABLA_FAST_FLOAT16};
  for (const auto logits : dtypes)
    for (const auto tables : dtypes)
      for (const auto results : dtypes)
        for (const bool linear : {false, true})
          mix(2, 131, logits, tables, results, tables == results, linear);
  for (const int64_t vocab : {1, 3, 4096, 4099})
    mix(3, vocab, NABLA_FAST_BFLOAT16, 0, 2, true, vocab > 4096);
  for (const int32_t cluster : {1, 16}) {
    nabla_fast_host_limit(4, 0, cluster);
    for (const int64_t vocab : {1, 3, 4099}) descend(4, vocab, vocab > 1, vocab > 3);
    for (const auto dtype : dtypes)
      for (const int64_t rows : {1, 2, 5}) descend(rows, 131, rows > 1, rows > 2, 40, dtype);
    descend(1, 9, false, false, 4104);
  }
  // A block without room for tiles in shared memory.
  nabla_fast_host_limit(1, 50000, 1);
  descend(1, 12293, false, false);
  return 0;
}
