// nabla_fast_dto_descent_latents: rounds of one step and one pass over the head.
//
// A pass finds the hard tokens and the gradients of all active rows. It decides whether the step
// before it moved a token, and gives the step after it its gradient: K steps take K + 1 passes, of
// which the last looks for tokens alone. Rows that have stopped are in none.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>

#include "base/check.h"
#include "base/floats.h"
#include "base/isa.h"
#include "base/threads.h"
#include "gemm/vocab_tiles.h"
#include "nabla_fast.h"
#include "ops/dto_descent.h"
#include "ops/dto_descent_latents_pass.h"
#include "simd/vec.h"
#include "softmax/head_map.h"
#include "softmax/row_status.h"

namespace nabla_fast::descent {
namespace {

// Multiplications worth another thread.
constexpr int64_t kProductsPerThread = int64_t{1} << 18;

// State of a row.
struct RowState {
  HeadPassResult result;  // by the last pass
  int64_t taken;          // steps of this call
  int64_t token;
  bool started, flipped, active;
};

struct Workspace {
  RowState* rows;        // [rows]
  StopGroups groups;     // [rows]
  int64_t* list;         // [2, rows]: of a pass, those with a gradient and those without
  float* gradient;       // [rows, width]
  SegmentSums* found;    // [segments, rows of a pass]
  float* hidden;         // [rows of a pass, width]
  char* packed;          // the same as products() reads them
  float* weighted_sums;  // [segments, weighted_sums_floats()]

  // Bytes, 0 if they are too many. memory: aligned, or null to count alone.
  static int64_t lay_out(const nabla_fast_descent_args& call, char* memory, Workspace* workspace) {
    const int64_t rows = call.rows, vocab = call.vocab, width = call.head.width;
    const int together = static_cast<int>(std::min<int64_t>(rows, kRowsPerHeadPass));
    const int64_t segments = head_segments(vocab);
    Size used = 0;
    const auto take = [&](auto*& array, Size bytes) {
      if (memory)
        array = reinterpret_cast<std::remove_reference_t<decltype(array)>>(memory + used.or_zero());
      used = used + bytes.rounded_up(kAlignment);
    };
    Workspace unused, &w = workspace ? *workspace : unused;
    take(w.rows, Size(rows) * sizeof(RowState));
    take(w.groups.order, Size(rows) * 8);
    take(w.groups.leader, Size(rows) * 8);
    take(w.groups.earliest, Size(rows) * 8);
    take(w.list, Size(rows) * 16);
    take(w.gradient, Size(rows) * width * 4);
    take(w.found, Size(segments) * together * sizeof(SegmentSums));
    take(w.hidden, Size(together) * width * 4);
    take(w.packed, Size(gemm::PackedRows::bytes(together, width)));
    take(w.weighted_sums, Size(segments) * weighted_sums_floats(together, width) * 4);
    return (used + kAlignment).or_zero();
  }
};

// -- a step ---------------------------------------------------------------------------------------

struct StepRow {
  float* h;
  float* exp_avg;
  float* exp_avg_sq;
  const float* gradient;
};

template <int W>
NABLA_FAST_INLINE void step_columns(const StepRow& row, int64_t columns, AdamRate rate) {
  for (int64_t k = 0; k + W <= columns; k += W) {
    Floats<W> first = load<W>(row.exp_avg + k), second = load<W>(row.exp_avg_sq + k);
    store<W>(row.h + k,
             adam<W>(load<W>(row.h + k), load<W>(row.gradient + k), rate, first, second));
    store<W>(row.exp_avg + k, first);
    store<W>(row.exp_avg_sq + k, second);
  }
}

template <int W>
NABLA_FAST_INLINE void step_row_kernel(const StepRow& row, int64_t width, AdamRate rate) {
  step_columns<W>(row, width, rate);
  const int64_t whole = width / W * W, rest = width - whole;
  if (rest == 0) return;
  // The last columns in vectors of their own.
  float last[4][W] = {};
  float* const from[] = {row.h + whole, row.exp_avg + whole, row.exp_avg_sq + whole};
  const size_t bytes = sizeof(float) * static_cast<size_t>(rest);
  for (int n = 0; n < 3; ++n) std::memcpy(last[n], from[n], bytes);
  std::memcpy(last[3], row.gradient + whole, bytes);
  step_columns<W>({last[0], last[1], last[2], last[3]}, W, rate);
  for (int n = 0; n < 3; ++n) std::memcpy(from[n], last[n], bytes);
}

NABLA_FAST_FOR_EACH_ISA(step_row, step_row_kernel<W>)

// -- the rows -------------------------------------------------------------------------------------

class Descent {
 public:
  Descent(const Call& call, const Workspace& workspace) : call_(call), w_(workspace) {}

  nabla_fast_status run() {
    for (int64_t row = 0; row < call_.rows; ++row) {
      w_.rows[row] = {};
      w_.rows[row].active = true;
    }
    pass_active_rows();
    bool good = true;
    for (int64_t row = 0; row < call_.rows; ++row) {
      call_.row_status[row] = status_of(w_.rows[row].result);
      good = good && call_.row_status[row] == NABLA_FAST_OK;
    }
    if (!good) return NABLA_FAST_BAD_ROWS;
    if (call_.group) w_.groups.sort(call_.group, call_.rows);
    for (int64_t row = 0; row < call_.rows; ++row) {
      RowState& state = w_.rows[row];
      state.token = state.result.token;
      state.started = true;
      state.active = call_.steps_left(row) > 0;
    }
    while (step_active_rows()) {
      pass_active_rows();
      stop_rows();
    }
    for (int64_t row = 0; row < call_.rows; ++row) {
      call_.step[row] += w_.rows[row].taken;
      call_.token[row] = w_.rows[row].token;
      call_.flipped[row] = w_.rows[row].flipped;
    }
    return NABLA_FAST_OK;
  }

 private:
  static nabla_fast_status status_of(const HeadPassResult& result) {
    return softmax::row_status(result.max, result.nan);
  }

  // A pass for every active row; with a gradient for those that may take another step.
  void pass_active_rows() {
    int64_t* const more = w_.list;
    int64_t* const last = w_.list + call_.rows;
    int64_t more_rows = 0, last_rows = 0;
    for (int64_t row = 0; row < call_.rows; ++row) {
      if (!w_.rows[row].active) continue;
      if (w_.rows[row].taken < call_.steps_left(row))
        more[more_rows++] = row;
      else
        last[last_rows++] = row;
    }
    pass_rows(more, more_rows, true);
    pass_rows(last, last_rows, false);
  }

  void pass_rows(const int64_t* list, int64_t count, bool sums) {
    const int64_t passes = (count + kRowsPerHeadPass - 1) / kRowsPerHeadPass;
    // Equal numbers of rows: a pass costs no less than reading the head.
    for (int64_t n = 0; n < passes; ++n) {
      const int64_t begin = count * n / passes, end = count * (n + 1) / passes;
      pass_together(list + begin, static_cast<int>(end - begin), sums);
    }
  }

  void pass_together(const int64_t* list, int count, bool sums) {
    const int64_t width = call_.head.width;
    HeadPass pass{{}, {}, softmax::HeadMap(call_.head_map), 0, 0, false, {}};
    for (int n = 0; n < count; ++n) {
      const int64_t row = list[n];
      const float* const h = call_.parameter_of(row);
      std::copy(h, h + width, w_.hidden + n * width);
      const float* const grad = call_.grad_of(row);
      const RowState& state = w_.rows[row];
      pass.row[n] = {grad, call_.noise_seed ? call_.noise_seed[row] : 0,
                     call_.noise_seed ? call_.noise_position[row] : 0, state.started,
                     state.started ? grad[state.token] : 0.0f};
    }
    pass.rows = gemm::pack_rows({w_.hidden, NABLA_FAST_FLOAT32, width, width}, count,
                                call_.head.dtype, w_.packed);
    pass.head = gemm::table_of(call_.head, call_.vocab);
    pass.inverse_tau = static_cast<float>(1 / call_.tau);
    pass.noise = call_.noise_seed;

    const int64_t segments = head_segments(call_.vocab), tokens = head_segment_tokens(call_.vocab);
    const int64_t weighted_sums = weighted_sums_floats(count, width);
    // Reading the head costs as much as the arithmetic of some rows.
    const int64_t work = (Size(call_.vocab) * std::max<int64_t>(width, 1) * (count + 4)).or_most();
    const int threads = threads_for(work, kProductsPerThread, call_.num_threads);
    for (const float scale : kPassScales) {
      pass.scale = scale;
      // Dynamic: with equal shares all threads would wait for a core that is slower, or shared.
#pragma omp parallel for schedule(dynamic) num_threads(threads) if (threads > 1)
      for (int64_t s = 0; s < segments; ++s)
        pass_segment(pass, s * tokens, std::min(call_.vocab, (s + 1) * tokens),
                     w_.found + s * count, sums ? w_.weighted_sums + s * weighted_sums : nullptr);
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1)
      for (int n = 0; n < count; ++n) {
        if (scale != kPassScales[0] && has_gradient(list[n])) continue;
        w_.rows[list[n]].result =
            join_segments(w_.found, w_.weighted_sums, segments, count, n, width, call_.tau,
                          sums ? w_.gradient + list[n] * width : nullptr);
      }
      if (!sums || std::all_of(list, list + count, [&](int64_t r) { return has_gradient(r); }))
        break;
    }
  }

  // Whether the gradient of a row is finite, or can be none.
  bool has_gradient(int64_t row) const {
    const HeadPassResult& result = w_.rows[row].result;
    const int64_t width = call_.head.width;
    const float* const gradient = w_.gradient + row * width;
    const auto is_finite = [](float x) { return std::isfinite(x); };
    return status_of(result) != NABLA_FAST_OK ||
           (std::isfinite(result.mean) && std::all_of(gradient, gradient + width, is_finite));
  }

  // A step of every active row. Returns whether there was one.
  bool step_active_rows() {
    auto* const step = step_row.select();
    bool any = false;
    for (int64_t row = 0; row < call_.rows; ++row) {
      RowState& state = w_.rows[row];
      if (!state.active) continue;
      any = true;
      const int64_t width = call_.head.width;
      const StepRow at{call_.parameter_of(row), call_.exp_avg_of(row), call_.exp_avg_sq_of(row),
                       w_.gradient + row * width};
      if (status_of(state.result) == NABLA_FAST_OK && std::isfinite(state.result.mean)) {
        step(at, width, call_.rate(row, state.taken));
      } else {
        // The softmax of the row is NaN.
        for (float* array : {at.h, at.exp_avg, at.exp_avg_sq}) std::fill_n(array, width, kNaN);
      }
      ++state.taken;
    }
    return any;
  }

  // Stops rows whose token has moved, or one of their group, or that have no step left.
  void stop_rows() {
    for (int64_t row = 0; row < call_.rows; ++row) {
      RowState& state = w_.rows[row];
      if (!state.active) continue;
      state.flipped = state.result.token != state.token;
      state.token = state.result.token;
      if (state.flipped && leader(row) >= 0) w_.groups.earliest[leader(row)] = state.taken;
    }
    for (int64_t row = 0; row < call_.rows; ++row) {
      RowState& state = w_.rows[row];
      const bool together = leader(row) >= 0 && w_.groups.earliest[leader(row)] <= state.taken;
      state.active =
          state.active && !state.flipped && !together && state.taken < call_.steps_left(row);
    }
  }

  int64_t leader(int64_t row) const { return call_.group ? w_.groups.leader[row] : -1; }

  const Call& call_;
  Workspace w_;
};

// OK, or why what a call reads is refused.
nabla_fast_status check(const nabla_fast_descent_args& call) {
  if (const auto refused = check_inputs(call)) return refused;
  if (const auto refused = softmax::check_head_map(call.head_map, call.vocab)) return refused;
  if (call.rows == 0) return NABLA_FAST_OK;
  const int64_t width = call.head.width;
  if (const auto refused = check_matrix(call.head, call.vocab, width)) return refused;
  // So that the workspace can be laid out.
  return fits({{width, 1}}, 4 * gemm::kRowsPerGroup) &&
                 (Size(kMaxHeadSegments) * (2 * kRowsPerHeadPass * 4) * width).fits()
             ? NABLA_FAST_OK
             : NABLA_FAST_TOO_LARGE;
}

int64_t workspace_of(const nabla_fast_descent_args& call) {
  return call.rows > 0 ? Workspace::lay_out(call, nullptr, nullptr) : 0;
}

}  // namespace
}  // namespace nabla_fast::descent

using namespace nabla_fast;
using namespace nabla_fast::descent;

int64_t nabla_fast_dto_descent_latents_workspace(const nabla_fast_descent_args* args) {
  return workspace_bytes(args, check, workspace_of);
}

nabla_fast_status nabla_fast_dto_descent_latents(const nabla_fast_descent_args* args) {
  Call call;
  if (const auto refused = read_args<nabla_fast_descent_args>(args, call)) return refused;
  if (const auto refused = check(call)) return refused;
  if (call.rows == 0) return NABLA_FAST_OK;
  const int64_t bytes = workspace_of(call);
  if (const auto refused = check_outputs(call, call.head.width, &call.head, bytes)) return refused;
  if (const auto refused = check_steps(call)) return refused;
  if (!waits(call)) call.group = nullptr;
  Workspace workspace;
  Workspace::lay_out(call, aligned(call.workspace), &workspace);
  return Descent(call, workspace).run();
}
