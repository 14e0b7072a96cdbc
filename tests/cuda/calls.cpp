// Calls of the CUDA kernels whose arrays have their own allocations, for sanitizers: small mixes and
// their backward, with every dtype of logits, tables and results, and rows that lie apart.

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

void call(int64_t rows, int64_t vocab, nabla_fast_dtype logits, nabla_fast_dtype tables,
          nabla_fast_dtype results, bool noise) {
  const int64_t gap = static_cast<int64_t>(numbers() % 3);
  const int64_t widths[] = {5, 67};
  std::vector<int64_t> seed(static_cast<size_t>(rows), -7), position(seed);
  std::vector<nabla_fast_status> status(static_cast<size_t>(rows));
  const Matrix z(rows, vocab, gap, logits), direct(rows, vocab, gap, tables);
  const Matrix table0(vocab, widths[0], gap, tables), table1(vocab, widths[1], gap, results);
  const Matrix state0(rows, widths[0], gap, results), state1(rows, widths[1], gap, tables);
  Matrix mix0(rows, widths[0], gap, results), mix1(rows, widths[1], gap, results);
  Matrix grad(rows, vocab, gap, logits);
  const nabla_fast_matrix all_tables[] = {table0.read(), table1.read()};
  const nabla_fast_matrix all_states[] = {state0.read(), state1.read()};
  const nabla_fast_output all_mixes[] = {mix0.written(), mix1.written()};

  nabla_fast_mix_args args = {};
  args.size = sizeof args;
  args.rows = rows;
  args.vocab = vocab;
  args.logits = z.read();
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
  using Function = nabla_fast_status (*)(const nabla_fast_mix_args*, nabla_fast_cuda_stream);
  const auto run = [&](const char* name, int64_t bytes, Function function) {
    const auto workspace = std::make_unique<char[]>(static_cast<size_t>(bytes));
    args.workspace = workspace.get();
    args.workspace_bytes = bytes;
    if (const auto answer = function(&args, nullptr)) fail(name, answer);
    for (const nabla_fast_status row : status)
      if (row != NABLA_FAST_OK) fail(name, row);
  };
  for (args.hard = 0; args.hard < 2; ++args.hard)
    run("embedding_mix", nabla_fast_cuda_embedding_mix_workspace(&args),
        nabla_fast_cuda_embedding_mix);
  run("embedding_mix_backward", nabla_fast_cuda_embedding_mix_backward_workspace(&args),
      nabla_fast_cuda_embedding_mix_backward);
}

}  // namespace

int main() {
  nabla_fast_host_configure(1, 90);
  const nabla_fast_dtype dtypes[] = {NABLA_FAST_FLOAT32, NABLA_FAST_BFLOAT16, NABLA_FAST_FLOAT16};
  for (const auto logits : dtypes)
    for (const auto tables : dtypes)
      for (const auto results : dtypes) call(2, 131, logits, tables, results, tables == results);
  for (const int64_t vocab : {1, 3, 4096, 4099}) call(3, vocab, NABLA_FAST_BFLOAT16, 0, 2, true);
  return 0;
}
