// Functions of the C interface for Python, made of a function, the size query of its workspace and
// a table of its struct's fields.
//
// Python calls one with keywords, each the name of a field; a field that is not given, or None, is
// 0. What stands for a field follows from its type:
//
//   number                                  number
//   pointer to an array                     tensor, or its address
//   nabla_fast_matrix, nabla_fast_output    tensor, or (address, width, stride, dtype)
//   nabla_fast_heads, nabla_fast_pool, ...  tensor
//   tensor with sizes                       tensor, which sets the fields of its sizes too, or as above
//   nabla_fast_head_map                     (tensor or None, scale, softcap)
//   pointer to an array with a count        sequence; those of a call have one length, the count
//
// The function gets a workspace of its own unless it is given one, and runs without the GIL. It
// returns False for NABLA_FAST_BAD_ROWS and raises ValueError for other statuses than OK.
//
// Tensors are torch's, or have its data_ptr(), shape, stride() and dtype; the caller keeps them
// alive and has checked the dtypes and strides of all but matrices.
#ifndef NABLA_FAST_PYTHON_ARGUMENTS_H_
#define NABLA_FAST_PYTHON_ARGUMENTS_H_

#include <pybind11/pybind11.h>

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <limits>
#include <memory>
#include <new>
#include <string>
#include <type_traits>
#include <vector>

#include "bindings.h"
#include "nabla_fast.h"
#include "pages.h"

namespace nabla_fast::bindings {

// Arrays that a call's struct points at.
struct Memory {
  Py_ssize_t count = -1;  // elements of each, once there is one
  std::vector<std::unique_ptr<char[]>> arrays;
};

inline void convert(PyObject* value, int64_t& to) {
  to = PyLong_AsLongLong(value);
  if (to == -1 && PyErr_Occurred()) throw pybind11::error_already_set();
}

inline void convert(PyObject* value, int32_t& to) {
  int64_t wide;
  convert(value, wide);
  to = static_cast<int32_t>(wide);
  if (to == wide) return;
  PyErr_SetString(PyExc_OverflowError, "the number has more than 32 bits");
  throw pybind11::error_already_set();
}

inline void convert(PyObject* value, double& to) {
  to = PyFloat_AsDouble(value);
  if (to == -1 && PyErr_Occurred()) throw pybind11::error_already_set();
}

// Attributes of tensors.
struct Names {
  PyObject* data_ptr = PyUnicode_InternFromString("data_ptr");
  PyObject* shape = PyUnicode_InternFromString("shape");
  PyObject* stride = PyUnicode_InternFromString("stride");
  PyObject* dtype = PyUnicode_InternFromString("dtype");

  static const Names& get() {
    static const Names names;
    return names;
  }
};

inline pybind11::object owned(PyObject* object) {
  if (!object) throw pybind11::error_already_set();
  return pybind11::reinterpret_steal<pybind11::object>(object);
}

inline pybind11::object attribute(PyObject* tensor, PyObject* name) {
  return owned(PyObject_GetAttr(tensor, name));
}

inline pybind11::object called(PyObject* tensor, PyObject* name) {
  return owned(PyObject_CallMethodNoArgs(tensor, name));
}

template <typename T>
void convert(PyObject* value, T*& to) {
  to = nullptr;
  if (value == Py_None) return;
  if (!PyLong_Check(value)) {
    convert(called(value, Names::get().data_ptr).ptr(), to);
    return;
  }
  const auto address = static_cast<uintptr_t>(PyLong_AsUnsignedLongLong(value));
  if (address == std::numeric_limits<uintptr_t>::max() && PyErr_Occurred())
    throw pybind11::error_already_set();
  to = pointer<T>(address);
}

// Converts the elements of a tuple, of which there may be more.
template <typename... T>
void convert_tuple(PyObject* tuple, T&... to) {
  if (!PyTuple_Check(tuple) || PyTuple_GET_SIZE(tuple) < static_cast<Py_ssize_t>(sizeof...(T)))
    throw pybind11::type_error("a tuple of " + std::to_string(sizeof...(T)) + " is needed");
  Py_ssize_t n = 0;
  (convert(PyTuple_GET_ITEM(tuple, n++), to), ...);
}

inline nabla_fast_dtype dtype_of(PyObject* dtype) {
  static std::atomic<PyObject*> known[2];  // by value; torch's last as long as the process
  for (int n = 0; n < 2; ++n)
    if (known[n] == dtype) return n;
  const auto name = pybind11::cast<std::string>(pybind11::str(pybind11::handle(dtype)));
  const int n = name == "torch.float32" ? NABLA_FAST_FLOAT32 : NABLA_FAST_BFLOAT16;
  if (n == NABLA_FAST_BFLOAT16 && name != "torch.bfloat16")
    throw pybind11::type_error("a matrix must be float32 or bfloat16, not " + name);
  known[n] = pybind11::handle(dtype).inc_ref().ptr();
  return n;
}

template <typename Matrix>
void convert_matrix(PyObject* value, Matrix& to) {
  if (PyTuple_Check(value)) {
    convert_tuple(value, to.data, to.width, to.stride, to.dtype);
    return;
  }
  const Names& names = Names::get();
  int64_t rows, unit;
  convert(value, to.data);
  convert_tuple(attribute(value, names.shape).ptr(), rows, to.width);
  convert_tuple(called(value, names.stride).ptr(), to.stride, unit);
  to.dtype = dtype_of(attribute(value, names.dtype).ptr());
  if (unit != 1 && to.width > 1 && rows > 0)
    throw pybind11::value_error("a matrix must have unit stride along its columns");
}

inline void convert(PyObject* value, nabla_fast_matrix& to) { convert_matrix(value, to); }
inline void convert(PyObject* value, nabla_fast_output& to) { convert_matrix(value, to); }

// Tensor of four axes.
template <typename Tensor, typename... Strides>
void convert_strided(PyObject* value, Tensor& to, Strides&... strides) {
  convert(value, to.data);
  convert_tuple(called(value, Names::get().stride).ptr(), strides...);
}

template <typename Heads, typename = decltype(Heads::batch_stride)>
void convert(PyObject* value, Heads& to) {
  convert_strided(value, to, to.batch_stride, to.head_stride, to.token_stride);
}

inline void convert(PyObject* value, nabla_fast_pool& to) {
  convert_strided(value, to, to.block_stride, to.token_stride, to.head_stride);
}

inline void convert(PyObject* value, nabla_fast_head_map& to) {
  convert_tuple(value, to.bias, to.scale, to.softcap);
}

// Keyword of a function, and how its value gets into the struct.
template <typename Args>
struct Field {
  const char* name;
  void (*set)(PyObject* value, Args& args, Memory& memory);
};

template <auto kMember, typename Args>
void set_field(PyObject* value, Args& args, Memory&) {
  convert(value, args.*kMember);
}

// The same of a tensor whose sizes are fields too, the first ones of its axes.
template <auto kMember, typename Args, auto... kSizes>
void set_sized(PyObject* value, Args& args, Memory&) {
  convert(value, args.*kMember);
  if (!PyLong_Check(value))
    convert_tuple(attribute(value, Names::get().shape).ptr(), args.*kSizes...);
}

template <auto kMember, auto kCount, typename Args>
void set_array(PyObject* value, Args& args, Memory& memory) {
  using Array = std::remove_reference_t<decltype(args.*kMember)>;
  using Element = std::remove_const_t<std::remove_pointer_t<Array>>;
  const auto items =
      pybind11::reinterpret_steal<pybind11::object>(PySequence_Fast(value, "a sequence is needed"));
  if (!items) throw pybind11::error_already_set();
  const Py_ssize_t count = PySequence_Fast_GET_SIZE(items.ptr());
  if (memory.count >= 0 && memory.count != count)
    throw pybind11::value_error("sequences of a call must be of one length");
  memory.count = count;
  memory.arrays.emplace_back(new char[static_cast<size_t>(count) * sizeof(Element)]);
  auto* const elements = reinterpret_cast<Element*>(memory.arrays.back().get());
  for (Py_ssize_t n = 0; n < count; ++n)
    convert(PySequence_Fast_GET_ITEM(items.ptr(), n), elements[n]);
  args.*kMember = elements;
  args.*kCount = count;
}

// Bytes from an address that is a multiple of 64 on, with any content.
struct FreeAligned {
  void operator()(void* memory) const { ::operator delete(memory, std::align_val_t{64}); }
};

inline std::unique_ptr<void, FreeAligned> aligned_memory(int64_t bytes) {
  std::unique_ptr<void, FreeAligned> memory(
      ::operator new(static_cast<size_t>(bytes), std::align_val_t{64}));
  advise_large_pages(memory.get(), bytes);
  return memory;
}

template <typename Args>
class Function {
 public:
  using Run = nabla_fast_status (*)(const Args*);
  using Query = int64_t (*)(const Args*);

  Function(const char* name, Run run, Query query, const std::vector<Field<Args>>& fields)
      : name_(name), run_(run), query_(query), fields_(fields) {
    for (const Field<Args>& field : fields_)
      names_.push_back(PyUnicode_InternFromString(field.name));
  }

  PyObject* run(PyObject* const* values, Py_ssize_t positional, PyObject* keywords) const {
    Args args{};
    Memory memory;
    read(values, positional, keywords, args, memory);
    nabla_fast_status status;
    {
      const pybind11::gil_scoped_release release;
      std::unique_ptr<void, FreeAligned> workspace;
      if (query_ && !args.workspace && args.workspace_bytes == 0) {
        args.workspace_bytes = query_(&args);
        if (args.workspace_bytes > 0) workspace = aligned_memory(args.workspace_bytes);
        args.workspace = workspace.get();
      }
      status = run_(&args);
    }
    if (status != NABLA_FAST_OK && status != NABLA_FAST_BAD_ROWS)
      throw pybind11::value_error(nabla_fast_status_string(status));
    return PyBool_FromLong(status == NABLA_FAST_OK);
  }

  PyObject* query(PyObject* const* values, Py_ssize_t positional, PyObject* keywords) const {
    Args args{};
    Memory memory;
    read(values, positional, keywords, args, memory);
    return PyLong_FromLongLong(query_(&args));
  }

 private:
  void read(PyObject* const* values, Py_ssize_t positional, PyObject* keywords, Args& args,
            Memory& memory) const {
    if (positional > 0) throw pybind11::type_error(name_ + "() takes keyword arguments only");
    args.size = sizeof(Args);
    const Py_ssize_t count = keywords ? PyTuple_GET_SIZE(keywords) : 0;
    uint64_t given = 0;
    size_t guess = 0;  // callers name fields in the order of the table
    for (Py_ssize_t n = 0; n < count; ++n) {
      PyObject* const keyword = PyTuple_GET_ITEM(keywords, n);
      const size_t index = find(keyword, guess);
      if (index == fields_.size() || given >> index & 1)
        throw pybind11::type_error(
            name_ + (index == fields_.size() ? "() has no argument '" : "() got twice '") +
            pybind11::cast<std::string>(keyword) + "'");
      given |= uint64_t{1} << index;
      guess = index + 1;
      if (values[n] != Py_None) fields_[index].set(values[n], args, memory);
    }
  }

  // Index of a field; their number where there is none of this name.
  size_t find(PyObject* keyword, size_t guess) const {
    const size_t count = names_.size();
    // Names in programs are interned, as those of the table are.
    for (size_t n = 0; n < count; ++n) {
      const size_t index = (guess + n) % count;
      if (names_[index] == keyword) return index;
    }
    for (size_t n = 0; n < count; ++n)
      if (PyUnicode_CompareWithASCIIString(keyword, fields_[n].name) == 0) return n;
    return count;
  }

  std::string name_;
  Run run_;
  Query query_;
  std::vector<Field<Args>> fields_;
  std::vector<PyObject*> names_;
};

// What Python calls: kMethod of a Function that `self` is a capsule of.
template <typename Args, auto kMethod>
PyObject* call(PyObject* self, PyObject* const* values, Py_ssize_t positional, PyObject* keywords) {
  const auto* function = static_cast<Function<Args>*>(PyCapsule_GetPointer(self, nullptr));
  try {
    return (function->*kMethod)(values, positional, keywords);
  } catch (pybind11::error_already_set& error) {
    error.restore();
  } catch (const pybind11::builtin_exception& error) {
    error.set_error();
  } catch (const std::bad_alloc&) {
    PyErr_NoMemory();
  }
  return nullptr;
}

// Defines module.name() and, where it has a workspace, module.name_workspace(). What they are made
// of lives as long as the process.
template <typename Args>
void bind_function(pybind11::module_& module, const char* name, typename Function<Args>::Run run,
                   typename Function<Args>::Query query, const std::vector<Field<Args>>& fields) {
  auto* const function = new Function<Args>(name, run, query, fields);
  const auto define = [&](const std::string& as, auto* body) {
    auto* const names = new std::string(as);
    auto* const method = new PyMethodDef{
        names->c_str(), reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(body)),
        METH_FASTCALL | METH_KEYWORDS, "As in nabla_fast.h, with a keyword a field."};
    const auto self =
        pybind11::reinterpret_steal<pybind11::object>(PyCapsule_New(function, nullptr, nullptr));
    module.attr(names->c_str()) = pybind11::reinterpret_steal<pybind11::object>(
        PyCFunction_NewEx(method, self.ptr(), module.attr("__name__").ptr()));
  };
  define(name, &call<Args, &Function<Args>::run>);
  if (query) define(std::string(name) + "_workspace", &call<Args, &Function<Args>::query>);
}

}  // namespace nabla_fast::bindings

#endif  // NABLA_FAST_PYTHON_ARGUMENTS_H_
