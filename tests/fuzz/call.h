// A call of a function, what is wrong with it, and what holds for every function.
//
//   Call<nabla_fast_nll_grad_args> call(random, nabla_fast_nll_grad, nabla_fast_nll_grad_workspace);
//   call.rows(call.args.rows, rows);
//   call.reads(By::kRows, call.args.hidden, hidden);
//   call.writes(By::kRows, call.args.grad, grad);
//   call.mistake(NABLA_FAST_INVALID_TOKEN, [&] { targets[0] = -1; });
//   if (random.one_in(3)) return call.check_refused();
//   const auto before = call.state();
//   check(call.run() == NABLA_FAST_OK, "right arguments are refused");
//   const auto after = call.state();
//   call.check_inputs();
//   call.check_again(before, after);
//
// From the arrays follow calls with null pointers, strides that nothing has room for, dtypes and widths
// that are wrong, outputs that overlap; and calls of single rows, and of arrays that interleave.
#ifndef NABLA_FAST_FUZZ_CALL_H_
#define NABLA_FAST_FUZZ_CALL_H_

#include <algorithm>
#include <deque>
#include <functional>
#include <memory>
#include <utility>
#include <vector>

#include "fuzz.h"
#include "tensor.h"

namespace fuzz {

// sizeof of each struct in the first version that had it: programs compiled then still pass it.
constexpr int64_t first_size(const nabla_fast_stats_args&) { return 192; }
constexpr int64_t first_size(const nabla_fast_draw_args&) { return 160; }
constexpr int64_t first_size(const nabla_fast_lm_logits_args&) { return 144; }
constexpr int64_t first_size(const nabla_fast_nll_grad_args&) { return 160; }
constexpr int64_t first_size(const nabla_fast_descent_args&) { return 304; }
constexpr int64_t first_size(const nabla_fast_mix_args&) { return 280; }
constexpr int64_t first_size(const nabla_fast_onehot_args&) { return 208; }
constexpr int64_t first_size(const nabla_fast_attention_args&) { return 456; }

// What the first axis of an array is.
enum class By { kRows, kOthers };

// An array of a call: a tensor, and the fields that say where it is.
struct Array {
  AnyTensor* tensor;
  By by;
  bool written;
  void* address_field;  // of any pointer type
  std::vector<int64_t*> stride_fields;
  int64_t* width_field = nullptr;
  nabla_fast_dtype* dtype_field = nullptr;
  bool any_dtype = true;
  bool may_be_null = false;
  bool stays = false;  // cannot be given elsewhere
  int64_t row = 1;     // elements of a row of an array without strides

  void* address() const {
    void* address;
    std::memcpy(&address, address_field, sizeof address);
    return address;
  }
  void put_address(uintptr_t address) { std::memcpy(address_field, &address, sizeof address); }
  // The tensor where the fields say that it is.
  View view() const {
    View view = tensor->view();
    view.first = reinterpret_cast<uintptr_t>(address());
    for (size_t n = 0; n < view.axes.size(); ++n) view.axes[n].stride = *stride_fields[n];
    return view;
  }
  void place(const View& view) {
    put_address(view.first);
    for (size_t n = 0; n < view.axes.size(); ++n) *stride_fields[n] = view.axes[n].stride;
  }
  bool empty() const { return tensor->view().bytes() == 0; }
};

// The elements of each array that is written.
using State = std::vector<std::vector<char>>;

// A random element of an array.
inline uintptr_t any_element(Random& random, const View& view) {
  uintptr_t address = view.first;
  const auto move = [&](int64_t count, int64_t stride) {
    const int64_t n = random.pick<int64_t>({0, count - 1, random.between(0, count - 1)});
    // The stride may be one of those that are wrong.
    address += static_cast<uintptr_t>(n) * static_cast<uintptr_t>(stride) *
               static_cast<uintptr_t>(view.element_bytes);
  };
  for (const View::Axis& axis : view.axes) move(axis.count, axis.stride);
  move(view.columns, 1);
  return address;
}

template <typename Args>
class Call {
 public:
  using Function = nabla_fast_status (*)(const Args*);
  using Query = int64_t (*)(const Args*);

  Args args{};
  std::deque<Array> arrays;
  // Whether it is a call without rows.
  bool nothing = false;

  explicit Call(Random& random, Function function, Query query = nullptr)
      : random_(random), function_(function), query_(query) {
    args.num_threads = random.threads();
    // What a function does not use, it does not read.
    if (!query) {
      garbage(args.workspace);
      garbage(args.workspace_bytes);
    }
  }
  Call(const Call&) = delete;
  Call& operator=(const Call&) = delete;

  Random& random() { return random_; }

  // -- what the call is given

  void rows(int64_t& field, int64_t value) {
    size(field, value, 0);
    rows_ = &field;
    nothing = value == 0;
  }
  // A number of elements: less than `least` is refused, and what no memory has room for.
  void size(int64_t& field, int64_t value, int64_t least) {
    field = value;
    any_mistake([this, &field, least] {
      field = least > 0 && random_.one_in(3) ? least - 1 : random_.negative();
    });
    any_mistake([this, &field] { field = random_.huge(); });
  }
  void tau(double value) {
    args.tau = value;
    mistake(NABLA_FAST_INVALID_TAU, [this] { args.tau = random_.wrong_tau(); });
  }

  Array& reads(By by, nabla_fast_matrix& field, AnyTensor& tensor) {
    return matrix(by, false, field, tensor);
  }
  Array& reads(By by, nabla_fast_matrix& field, Matrix& matrix) {
    return reads(by, field, matrix.tensor());
  }
  Array& writes(By by, nabla_fast_output& field, AnyTensor& tensor) {
    return matrix(by, true, field, tensor);
  }
  Array& reads(By by, nabla_fast_heads& field, AnyTensor& tensor) {
    return add(tensor, by, false, &field.data,
               {&field.batch_stride, &field.head_stride, &field.token_stride});
  }
  Array& reads(By by, nabla_fast_pool& field, AnyTensor& tensor) {
    return add(tensor, by, false, &field.data,
               {&field.block_stride, &field.token_stride, &field.head_stride});
  }
  Array& writes(By by, nabla_fast_heads_output& field, AnyTensor& tensor) {
    return add(tensor, by, true, &field.data,
               {&field.batch_stride, &field.head_stride, &field.token_stride});
  }
  // A pointer, and fields of the strides of the tensor's axes.
  template <typename T>
  Array& reads(By by, T*& field, AnyTensor& tensor, std::vector<int64_t*> strides = {}) {
    return add(tensor, by, false, &field, std::move(strides));
  }
  template <typename T>
  Array& writes(By by, T*& field, List<T>& tensor) {
    return add(tensor, by, true, &field, {});
  }

  // make() does one thing that is wrong, which is answered by `status`; by any, if that is OK.
  void mistake(nabla_fast_status status, std::function<void()> make) {
    mistakes_.push_back({status, std::move(make)});
  }
  void any_mistake(std::function<void()> make) { mistake(NABLA_FAST_OK, std::move(make)); }

  template <typename Field>
  void garbage(Field& field) {
    for (size_t n = 0; n < sizeof field; ++n)
      reinterpret_cast<char*>(&field)[n] = static_cast<char>(random_.next());
  }

  // -- calls

  // The call in a workspace of just its size, and in a struct of some version's size.
  nabla_fast_status run() {
    const Restored restored(*this);
    if (nothing && random_.one_in(2))
      for (Array& array : arrays) array.put_address(0);
    form_ = {};
    form_.size = static_cast<int64_t>(sizeof args);
    if (random_.one_in(4)) form_.size += random_.between(1, 70);
    // All that later versions added is 0.
    const char* const fields = reinterpret_cast<const char*>(&args);
    if (random_.one_in(4) &&
        std::all_of(fields + first_size(args), fields + sizeof args, [](char c) { return c == 0; }))
      form_.size = first_size(args);
    if (!query_) return with_struct(function_);
    const int64_t bytes = workspace_bytes();
    Workspace workspace(random_, bytes, random_.pick({0, 0xFF, 0x55}));
    args.workspace = workspace.data();
    args.workspace_bytes = bytes;
    return with_struct(function_);
  }

  // A call with something wrong is refused, and has written nothing.
  void check_refused() {
    add_mistakes();
    form_ = {};
    form_.size = static_cast<int64_t>(sizeof args);
    const auto any = [&]() -> const Mistake& {
      return mistakes_[static_cast<size_t>(
          random_.between(0, static_cast<int64_t>(mistakes_.size()) - 1))];
    };
    const Mistake& wrong = any();
    wrong.make();
    // Two mistakes of one kind may undo each other.
    const Mistake* const second = random_.one_in(6) ? &any() : nullptr;
    const bool alone = !second || second->status == wrong.status;
    if (!alone) second->make();
    for (const Array& array : arrays) array.tensor->seal();

    int64_t bytes = 0;
    nabla_fast_status status;
    if (query_) {
      bytes = workspace_bytes();
      const bool small = form_.workspace_is_small && bytes > 0;
      bytes = std::min<int64_t>(bytes, 1 << 26);
      Workspace workspace(random_, bytes - small, 0xAA);
      args.workspace = form_.no_workspace ? nullptr : workspace.data();
      args.workspace_bytes = bytes - small;
      if (form_.workspace_over && bytes > 0)
        args.workspace =
            reinterpret_cast<void*>(any_element(random_, form_.workspace_over->view()) -
                                    static_cast<uintptr_t>(random_.pick<int64_t>({0, bytes - 1})));
      status = with_struct(function_);
    } else {
      status = with_struct(function_);
    }
    const bool of_struct = wrong.status == NABLA_FAST_INVALID_SIZE;
    check(refuses(status) || (nothing && !of_struct && status == NABLA_FAST_OK),
          "wrong arguments are accepted");
    if (alone && wrong.status != NABLA_FAST_OK && (of_struct || !nothing))
      check(status == wrong.status, "a mistake has another's status");
    check(all_untouched(), "a refused call has written");
  }

  // -- what right calls do

  State state() const {
    State state;
    for (const Array& array : arrays)
      if (array.written) state.push_back(array.tensor->view().elements());
    return state;
  }
  void put(const State& state) {
    auto from = state.begin();
    for (const Array& array : arrays)
      if (array.written) array.tensor->view().put(*from++);
  }
  // Whether the bits of two states are the same; those of `but` may differ.
  bool same_state(const State& a, const State& b, const AnyTensor* but = nullptr) const {
    size_t n = 0;
    bool equal = true;
    for (const Array& array : arrays) {
      if (!array.written) continue;
      equal = equal && (array.tensor == but || same_elements(*array.tensor, a[n], b[n]));
      ++n;
    }
    return equal;
  }
  void check_inputs() {
    for (const Array& array : arrays)
      if (!array.written) check(array.tensor->untouched(), "inputs have changed");
  }
  // On other threads and in another workspace.
  void check_again(const State& before, const State& after) {
    put(before);
    args.num_threads = random_.threads();
    check(run() == NABLA_FAST_OK && same_state(state(), after),
          "the result depends on the threads or on what the workspace holds");
  }
  // Rows alone are as they are among others; at most `apart` rows are left out between two.
  void check_rows_alone(const State& before, const State& after, int64_t apart) {
    if (nothing) return;
    const int64_t count = *rows_;
    for (int64_t r = random_.between(0, std::min(apart, count) - 1); r < count;
         r += random_.between(1, apart)) {
      put(before);
      const Restored restored(*this);
      for (Array& array : arrays) {
        if (array.by != By::kRows || !is_there(array)) continue;
        const View view = array.view();
        const int64_t stride = view.axes.empty() ? array.row : view.axes[0].stride;
        if (r > 0)
          array.put_address(view.first + static_cast<uintptr_t>(r * stride * view.element_bytes));
        // Nothing lies a stride away from one row.
        if (!view.axes.empty() && random_.one_in(4))
          *array.stride_fields[0] = random_.pick<int64_t>({random_.huge(), INT64_MIN, 0});
      }
      *rows_ = 1;
      args.num_threads = random_.threads();
      check(run() == NABLA_FAST_OK, "a row alone is refused");
      State expected = before;
      size_t n = 0;
      for (const Array& array : arrays) {
        if (!array.written) continue;
        const size_t bytes = after[n].size() / static_cast<size_t>(count);
        const size_t at = bytes * static_cast<size_t>(r);
        if (bytes > 0) std::memcpy(&expected[n][at], &after[n][at], bytes);
        ++n;
      }
      check(same_state(state(), expected), "a row's result depends on the others");
    }
    put(after);
  }
  // Arrays whose rows take turns in one buffer, and rows side by side, overlap nowhere.
  void check_interleaved(const State& before, const State& after) {
    Buffer buffer;
    size_t axes = 0;
    for (const Array& array : arrays) axes = std::max(axes, array.tensor->view().axes.size());
    plan(buffer, axes);
    if (buffer.bytes == 0 || buffer.bytes > 1 << 25) return;
    put(before);
    const Restored restored(*this);
    std::vector<char> memory(static_cast<size_t>(buffer.bytes), '\xC3');
    for (auto& [array, view] : buffer.views) {
      view.first += reinterpret_cast<uintptr_t>(memory.data());
      view.put(array->tensor->view().elements());
      array->place(view);
    }
    std::vector<char> expected = memory;
    args.num_threads = random_.threads();
    check(run() == NABLA_FAST_OK, "arrays that take turns in memory are refused");
    size_t n = 0;
    for (const Array& array : arrays) {
      if (!array.written) continue;
      const auto& wanted = after[n++];
      if (!is_there(array)) continue;
      const auto found = array.view().elements();
      check(same_elements(*array.tensor, found, wanted),
            "the result depends on where its arrays lie");
      // NaNs are alike.
      if (buffer.has(array)) {
        View view = array.view();
        view.first += reinterpret_cast<uintptr_t>(expected.data()) -
                      reinterpret_cast<uintptr_t>(memory.data());
        view.put(found);
      }
    }
    check(memory == expected, "a call writes between its rows");
    put(after);
  }
  // The call somewhere else, or with fewer rows, until this is gone.
  class Restored {
   public:
    explicit Restored(Call& call) : call_(call), args_(call.args) {
      for (const Array& array : call.arrays) views_.push_back(array.view());
    }
    Restored(const Restored&) = delete;
    Restored& operator=(const Restored&) = delete;
    ~Restored() {
      call_.args = args_;
      auto view = views_.begin();
      for (Array& array : call_.arrays) array.place(*view++);
    }

   private:
    Call& call_;
    Args args_;
    std::vector<View> views_;
  };

 private:
  struct Mistake {
    nabla_fast_status status;
    std::function<void()> make;
  };
  // How the struct and the workspace are given.
  struct Form {
    int64_t size;
    bool null, unknown_field;  // no struct, or one with a field that no version has
    bool no_workspace, workspace_is_small;
    const Array* workspace_over;
  };

  template <typename Field>
  Array& matrix(By by, bool written, Field& field, AnyTensor& tensor) {
    field.width = tensor.columns();
    field.dtype = tensor.floats() ? NABLA_FAST_FLOAT32 : NABLA_FAST_BFLOAT16;
    Array& array = add(tensor, by, written, &field.data, {&field.stride});
    array.width_field = &field.width;
    array.dtype_field = &field.dtype;
    array.any_dtype = !written;
    return array;
  }
  Array& add(AnyTensor& tensor, By by, bool written, void* address, std::vector<int64_t*> strides) {
    Array array{};
    array.tensor = &tensor;
    array.by = by;
    array.written = written;
    array.address_field = address;
    array.stride_fields = std::move(strides);
    array.any_dtype = true;
    array.place(tensor.view());
    // What has no elements has no address.
    if (array.empty() && random_.one_in(2)) array.put_address(0);
    arrays.push_back(array);
    return arrays.back();
  }

  static bool is_there(const Array& array) { return !array.empty() && array.address(); }

  static bool same_elements(const AnyTensor& tensor, const std::vector<char>& a,
                            const std::vector<char>& b) {
    if (a.size() != b.size()) return false;
    if (!tensor.floats()) return a == b;
    return same(Tensor<float>::of(a), Tensor<float>::of(b),
                static_cast<int64_t>(a.size() / sizeof(float)));
  }
  bool all_untouched() const {
    bool same = true;
    for (const Array& array : arrays) same = array.tensor->untouched() && same;
    return same;
  }

  // f of a struct with memory of its own.
  template <typename Result>
  Result with_struct(Result (*f)(const Args*)) {
    if (form_.null) return f(nullptr);
    args.size = form_.size;
    constexpr int64_t kLeast = sizeof args.size, kMost = 4096;
    const auto bytes =
        static_cast<size_t>(form_.size > kMost ? sizeof args : std::max(form_.size, kLeast));
    const std::unique_ptr<char[]> memory(new char[bytes]());
    std::memcpy(memory.get(), &args, std::min(bytes, sizeof args));
    if (form_.unknown_field && bytes > sizeof args)
      memory[static_cast<size_t>(random_.between(sizeof args, static_cast<int64_t>(bytes) - 1))] =
          1;
    return f(reinterpret_cast<const Args*>(memory.get()));
  }
  // Of a query, which reads neither field of the workspace.
  int64_t workspace_bytes() {
    garbage(args.workspace);
    garbage(args.workspace_bytes);
    const int64_t bytes = with_struct(query_);
    check(bytes >= 0, "a size is negative");
    const bool readable = !form_.null && !form_.unknown_field && form_.size >= first_size(args) &&
                          form_.size <= static_cast<int64_t>(sizeof args) + 100;
    check(readable || bytes == 0, "a struct of another size needs a workspace");
    return bytes;
  }

  void add_mistakes() {
    mistake(NABLA_FAST_INVALID_SIZE, [this] {
      const int64_t first = first_size(args);
      form_.size = random_.pick<int64_t>({0, 1, -1, INT64_MIN, first - 1, first - 8, first / 2,
                                          INT64_MAX, INT64_MAX - 7, int64_t{1} << 40, 1 << 16});
    });
    mistake(NABLA_FAST_INVALID_SIZE, [this] {
      form_.size = static_cast<int64_t>(sizeof args) + random_.between(1, 70);
      form_.unknown_field = true;
    });
    mistake(NABLA_FAST_INVALID_POINTER, [this] { form_.null = true; });
    if (query_) {
      mistake(NABLA_FAST_WORKSPACE_TOO_SMALL, [this] { form_.workspace_is_small = true; });
      mistake(NABLA_FAST_INVALID_POINTER, [this] { form_.no_workspace = true; });
    }
    int64_t number = 0;
    const auto there = std::count_if(arrays.begin(), arrays.end(), is_there);
    for (Array& array : arrays) {
      if (array.width_field) add_mistakes_of_matrix(array, ++number);
      if (array.empty()) continue;
      if (!array.may_be_null)
        mistake(NABLA_FAST_INVALID_POINTER, [&array] { array.put_address(0); });
      for (size_t n = 0; n < array.stride_fields.size(); ++n) {
        if (array.tensor->view().axes[n].count <= 1) continue;
        mistake(NABLA_FAST_TOO_LARGE, [this, &array, n] {
          *array.stride_fields[n] = random_.one_in(3) ? INT64_MIN : random_.huge();
        });
        if (!array.written) continue;
        mistake(NABLA_FAST_OVERLAP, [this, &array, n] {
          const int64_t below = array.tensor->columns() - 1;
          *array.stride_fields[n] = random_.pick<int64_t>({0, below, -below, below / 2});
        });
      }
      if (is_there(array) && query_)
        mistake(NABLA_FAST_OVERLAP, [this, &array] { form_.workspace_over = &array; });
      if (array.written && there > 1)
        mistake(NABLA_FAST_OVERLAP, [this, &array] { overlap(array); });
    }
  }
  // more: columns that no other matrix is too wide by, so that two mistakes do not agree.
  void add_mistakes_of_matrix(Array& array, int64_t more) {
    any_mistake([this, &array, more] {
      *array.width_field = random_.pick<int64_t>(
          {random_.negative(), random_.huge(), array.tensor->columns() + more});
    });
    mistake(NABLA_FAST_UNKNOWN_DTYPE, [this, &array] {
      const nabla_fast_dtype other =
          array.tensor->floats() ? NABLA_FAST_BFLOAT16 : NABLA_FAST_FLOAT32;
      *array.dtype_field = !array.any_dtype && random_.one_in(2)
                               ? other
                               : random_.pick<nabla_fast_dtype>({-1, 2, INT32_MAX, INT32_MIN});
    });
  }
  // Puts what is written over another array: at its first element, at any, or one beside it.
  void overlap(Array& array) {
    std::vector<const Array*> others;
    for (const Array& other : arrays)
      if (&other != &array && is_there(other)) others.push_back(&other);
    // Another mistake may have taken them away.
    if (others.empty()) return;
    const Array& other =
        *others[static_cast<size_t>(random_.between(0, static_cast<int64_t>(others.size()) - 1))];
    const View view = array.view(), over = other.view();
    const auto bytes = static_cast<uintptr_t>(view.element_bytes);
    if (random_.one_in(4)) return array.put_address(over.first / bytes * bytes);
    const uintptr_t meets = any_element(random_, over) / bytes * bytes;
    array.put_address(meets - (any_element(random_, view) - view.first));
  }

  // Where arrays lie in one buffer.
  struct Buffer {
    int64_t bytes = 0;
    std::vector<std::pair<Array*, View>> views;

    bool has(const Array& array) const {
      return std::any_of(views.begin(), views.end(),
                         [&](const auto& view) { return view.first == &array; });
    }
  };
  // Arrays of so many axes take turns along some of these; rows of any element lie behind.
  void plan(Buffer& buffer, size_t axes) {
    std::vector<size_t> order(axes);
    for (size_t n = 0; n < axes; ++n) order[n] = n;
    for (size_t n = axes; n > 1; --n)
      std::swap(order[n - 1],
                order[static_cast<size_t>(random_.between(0, static_cast<int64_t>(n) - 1))]);
    const auto shared =
        static_cast<size_t>(axes > 0 ? random_.between(1, static_cast<int64_t>(axes)) : 0);
    int64_t turn = 0;
    std::vector<int64_t> most(axes, 1);
    for (Array& array : arrays) {
      View view = array.tensor->view();
      if (axes == 0 || view.axes.size() != axes || !movable(array)) continue;
      // Along the axes of its own, rows lie side by side.
      int64_t stride = view.columns;
      for (size_t n = shared; n < axes; ++n) {
        view.axes[order[n]].stride = stride;
        stride *= view.axes[order[n]].count;
      }
      view.first = static_cast<uintptr_t>(turn);
      turn = rounded_up(turn + stride * view.element_bytes);
      for (size_t n = 0; n < shared; ++n)
        most[order[n]] = std::max(most[order[n]], view.axes[order[n]].count);
      buffer.views.emplace_back(&array, view);
    }
    turn += random_.pick<int64_t>({0, 0, 8, 64});
    for (size_t n = 0; n < shared; ++n) {
      for (auto& [array, view] : buffer.views) {
        View::Axis& axis = view.axes[order[n]];
        axis.stride = turn / view.element_bytes;
        if (random_.one_in(4)) {
          view.first += static_cast<uintptr_t>((axis.count - 1) * turn);
          axis.stride = -axis.stride;
        }
      }
      // Beyond what is looked at, any number will do.
      turn = std::min<int64_t>(turn, int64_t{1} << 30) * most[order[n]];
    }
    buffer.bytes = turn;
    for (Array& array : arrays) {
      View view = array.tensor->view();
      if (!view.axes.empty() || !movable(array)) continue;
      buffer.bytes =
          (buffer.bytes + view.element_bytes - 1) / view.element_bytes * view.element_bytes;
      view.first = static_cast<uintptr_t>(buffer.bytes);
      buffer.bytes += view.bytes();
      buffer.views.emplace_back(&array, view);
    }
  }
  // Most of those that can be elsewhere.
  bool movable(const Array& array) { return !array.stays && is_there(array) && !random_.one_in(4); }
  static int64_t rounded_up(int64_t bytes) { return (bytes + 7) / 8 * 8; }

  Random& random_;
  Function function_;
  Query query_;
  Form form_{};
  int64_t* rows_ = nullptr;
  std::vector<Mistake> mistakes_;
};

}  // namespace fuzz

#endif  // NABLA_FAST_FUZZ_CALL_H_
