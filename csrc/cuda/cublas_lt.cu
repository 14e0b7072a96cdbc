#include <dlfcn.h>

#include <algorithm>
#include <cstdint>
#include <map>
#include <mutex>
#include <tuple>

#include "base/check.h"
#include "cublas_lt.h"
#include "device_limits.h"

// Names that the library is looked for by, in order, first among what the program has loaded.
#if !defined(NABLA_FAST_CUDA_CUBLAS_LT)
  #define NABLA_FAST_CUDA_CUBLAS_LT "libcublasLt.so.13", "libcublasLt.so.12", "libcublasLt.so"
#endif

namespace nabla_fast::cuda {
namespace {

// -- what cublasLt.h declares, of it what is used here --------------------------------------------

using Status = int;
constexpr Status kSuccess = 0;
enum DataType { kFloat32 = 0, kFloat16 = 2, kBFloat16 = 14 };
constexpr int kComputeFloat32 = 68;
constexpr int32_t kNotTransposed = 0, kTransposed = 1;
enum DescAttribute { kTransA = 3, kTransB = 4 };
enum PreferenceAttribute {
  kMostWorkspace = 1,
  kAlignmentA = 5,
  kAlignmentB,
  kAlignmentC,
  kAlignmentD
};

struct Algorithm {
  uint64_t data[8];
};
struct Heuristic {
  Algorithm algorithm;
  size_t workspace;
  Status state;
  float waves;
  int reserved[4];
};

struct Functions {
  Status (*create)(void** handle);
  Status (*desc_create)(void** desc, int compute, int scale);
  Status (*desc_set)(void* desc, int attribute, const void* value, size_t bytes);
  Status (*desc_destroy)(void* desc);
  Status (*layout_create)(void** layout, int type, uint64_t rows, uint64_t columns, int64_t stride);
  Status (*layout_destroy)(void* layout);
  Status (*preference_create)(void** preference);
  Status (*preference_set)(void* preference, int attribute, const void* value, size_t bytes);
  Status (*preference_destroy)(void* preference);
  Status (*heuristic)(void* handle, void* desc, void* a, void* b, void* c, void* d,
                      void* preference, int asked, Heuristic* found, int* count);
  Status (*matmul)(void* handle, void* desc, const void* alpha, const void* a, void* a_layout,
                   const void* b, void* b_layout, const void* beta, const void* c, void* c_layout,
                   void* d, void* d_layout, const Algorithm* algorithm, void* workspace,
                   size_t workspace_bytes, void* stream);
};

template <typename Function>
bool find(void* library, const char* name, Function*& function) {
  function = reinterpret_cast<Function*>(dlsym(library, name));
  return function != nullptr;
}

bool load(Functions& f) {
  const char* const names[] = {NABLA_FAST_CUDA_CUBLAS_LT, nullptr};
  void* library = nullptr;
  for (const int flags : {RTLD_NOW | RTLD_LOCAL | RTLD_NOLOAD, RTLD_NOW | RTLD_LOCAL})
    for (const char* const* name = names; *name && !library; ++name) library = dlopen(*name, flags);
  return library && find(library, "cublasLtCreate", f.create) &&
         find(library, "cublasLtMatmulDescCreate", f.desc_create) &&
         find(library, "cublasLtMatmulDescSetAttribute", f.desc_set) &&
         find(library, "cublasLtMatmulDescDestroy", f.desc_destroy) &&
         find(library, "cublasLtMatrixLayoutCreate", f.layout_create) &&
         find(library, "cublasLtMatrixLayoutDestroy", f.layout_destroy) &&
         find(library, "cublasLtMatmulPreferenceCreate", f.preference_create) &&
         find(library, "cublasLtMatmulPreferenceSetAttribute", f.preference_set) &&
         find(library, "cublasLtMatmulPreferenceDestroy", f.preference_destroy) &&
         find(library, "cublasLtMatmulAlgoGetHeuristic", f.heuristic) &&
         find(library, "cublasLtMatmul", f.matmul);
}

// Null where there is no such library.
const Functions* functions() {
  static Functions loaded;
  static const bool there = load(loaded);
  return there ? &loaded : nullptr;
}

// -- objects of the library -----------------------------------------------------------------------

// An object that is destroyed with this one; null where it could not be made.
class Object {
 public:
  explicit Object(Status (*destroy)(void*)) : destroy_(destroy) {}
  Object(const Object&) = delete;
  Object& operator=(const Object&) = delete;
  ~Object() {
    if (object_) destroy_(object_);
  }
  void** made() { return &object_; }
  void* get() const { return object_; }

 private:
  Status (*const destroy_)(void*);
  void* object_ = nullptr;
};

// The library's handle for a device. It is kept.
void* handle_of(int device) {
  constexpr int kMostDevices = 64;
  static void* handles[kMostDevices] = {};
  static std::mutex mutex;
  if (device < 0 || device >= kMostDevices) return nullptr;
  const std::lock_guard<std::mutex> lock(mutex);
  if (!handles[device] && functions()->create(&handles[device]) != kSuccess)
    handles[device] = nullptr;
  return handles[device];
}

int type_of(nabla_fast_dtype dtype) {
  if (dtype == NABLA_FAST_FLOAT32) return kFloat32;
  return dtype == NABLA_FAST_BFLOAT16 ? kBFloat16 : kFloat16;
}

// Bytes that every row's beginning is a multiple of, at most 256.
uint32_t alignment_of(const void* data, int64_t row_bytes) {
  const uint64_t bits =
      reinterpret_cast<uintptr_t>(data) | static_cast<uint64_t>(row_bytes) | uint64_t{256};
  return static_cast<uint32_t>(bits & (~bits + 1));
}

// Everything that an algorithm was chosen for.
using Problem = std::tuple<int, int64_t, int64_t, int64_t, int64_t, int64_t, int64_t, int, bool,
                           int64_t, uint32_t, uint32_t, uint32_t>;

// The library's matrices have columns side by side: a product of rows is the transposed product of theirs,
// out^T = right^T left^T.
class Matmul {
 public:
  Matmul(const Functions& f, const Product& product)
      : f_(f),
        product_(product),
        align_a_(
            alignment_of(product.right.data, product.right.stride * bytes_of(product.right.dtype))),
        align_b_(
            alignment_of(product.left.data, product.left.stride * bytes_of(product.left.dtype))),
        align_d_(alignment_of(product.out, product.out_stride * int64_t{sizeof(float)})) {}

  bool run(int device, void* stream) {
    void* const handle = handle_of(device);
    Heuristic chosen;
    if (!handle || !describe() || !choose(handle, device, chosen)) return false;
    const float alpha = 1, beta = product_.keep ? 1.0f : 0.0f;
    return f_.matmul(handle, desc_.get(), &alpha, product_.right.data, a_.get(), product_.left.data,
                     b_.get(), &beta, product_.out, d_.get(), product_.out, d_.get(),
                     &chosen.algorithm, product_.workspace, chosen.workspace, stream) == kSuccess;
  }

 private:
  bool describe() {
    const int type = type_of(product_.left.dtype);
    const auto rows = static_cast<uint64_t>(product_.rows),
               columns = static_cast<uint64_t>(product_.columns),
               inner = static_cast<uint64_t>(product_.inner);
    const int32_t a = product_.transposed ? kTransposed : kNotTransposed, b = kNotTransposed;
    return f_.desc_create(desc_.made(), kComputeFloat32, kFloat32) == kSuccess &&
           f_.desc_set(desc_.get(), kTransA, &a, sizeof a) == kSuccess &&
           f_.desc_set(desc_.get(), kTransB, &b, sizeof b) == kSuccess &&
           f_.layout_create(a_.made(), type, product_.transposed ? inner : columns,
                            product_.transposed ? columns : inner,
                            product_.right.stride) == kSuccess &&
           f_.layout_create(b_.made(), type, inner, rows, product_.left.stride) == kSuccess &&
           f_.layout_create(d_.made(), kFloat32, columns, rows, product_.out_stride) == kSuccess;
  }

  bool ask(void* handle, Heuristic& chosen) {
    Object preference(f_.preference_destroy);
    const auto workspace = static_cast<size_t>(product_.workspace_bytes);
    const auto set = [&](int attribute, const auto& value) {
      return f_.preference_set(preference.get(), attribute, &value, sizeof value) == kSuccess;
    };
    int count = 0;
    return f_.preference_create(preference.made()) == kSuccess && set(kMostWorkspace, workspace) &&
           set(kAlignmentA, align_a_) && set(kAlignmentB, align_b_) && set(kAlignmentC, align_d_) &&
           set(kAlignmentD, align_d_) &&
           f_.heuristic(handle, desc_.get(), a_.get(), b_.get(), d_.get(), d_.get(),
                        preference.get(), 1, &chosen, &count) == kSuccess &&
           count > 0 && chosen.state == kSuccess && chosen.workspace <= workspace;
  }

  // What the library has chosen before for the same problem; asking it costs more than a launch.
  bool choose(void* handle, int device, Heuristic& chosen) {
    static std::map<Problem, Heuristic> known;
    static std::mutex mutex;
    constexpr size_t kMostKnown = 4096;
    const Problem problem(device, product_.rows, product_.columns, product_.inner,
                          product_.left.stride, product_.right.stride, product_.out_stride,
                          product_.left.dtype, product_.transposed, product_.workspace_bytes,
                          align_a_, align_b_, align_d_);
    const std::lock_guard<std::mutex> lock(mutex);
    const auto found = known.find(problem);
    if (found != known.end()) {
      chosen = found->second;
      return true;
    }
    if (!ask(handle, chosen)) return false;
    if (known.size() >= kMostKnown) known.clear();
    known.emplace(problem, chosen);
    return true;
  }

  const Functions& f_;
  const Product& product_;
  const uint32_t align_a_, align_b_, align_d_;
  Object desc_{f_.desc_destroy}, a_{f_.layout_destroy}, b_{f_.layout_destroy},
      d_{f_.layout_destroy};
};

}  // namespace

bool cublas_lt_is_there() { return functions() != nullptr; }

bool cublas_lt_product(const Product& given, nabla_fast_cuda_stream stream) {
  const Functions* const f = functions();
  if (!f || given.rows <= 0 || given.columns <= 0 || given.inner <= 0) return false;
  Product product = given;
  // Of one row no stride is used, and callers may pass any; the library wants one as wide as the row.
  const int64_t right_width = product.transposed ? product.inner : product.columns;
  const int64_t right_rows = product.transposed ? product.columns : product.inner;
  if (product.rows == 1) product.left.stride = product.inner;
  if (product.rows == 1) product.out_stride = product.columns;
  if (right_rows == 1) product.right.stride = right_width;
  // Rows that overlap are not for the library.
  const bool apart = product.out_stride >= product.columns &&
                     product.left.stride >= product.inner && product.right.stride >= right_width;
  int device;
  return apart && read_device(device) && Matmul(*f, product).run(device, stream);
}

}  // namespace nabla_fast::cuda
