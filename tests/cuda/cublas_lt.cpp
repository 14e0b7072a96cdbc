// A library with the functions of cuBLASLt that csrc/cuda/cublas_lt.cu calls, in plain loops on the CPU. It
// holds its caller to what the real one asks for, and says what is wrong on standard error: the attributes
// and their sizes, layouts that fit each other, the alignments that were promised, an algorithm that was
// chosen for these very matrices.

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>

#include "device.h"

namespace {

using nabla_fast::cuda::bfloat16;
using nabla_fast::cuda::float16;
using nabla_fast::cuda::to_float;

constexpr int kSuccess = 0, kInvalidValue = 7, kNotSupported = 15;

struct Desc {
  int compute, scale;
  int32_t transposed[2];
};

struct Layout {
  int type;
  uint64_t rows, columns;
  int64_t stride;

  int64_t bytes() const { return type == 0 ? 4 : 2; }
  float at(const void* data, int64_t row, int64_t column) const {
    const int64_t place = column * stride + row;
    if (type == 0) return static_cast<const float*>(data)[place];
    if (type == 14) return to_float(static_cast<const bfloat16*>(data)[place]);
    return to_float(static_cast<const float16*>(data)[place]);
  }
};

struct Preference {
  uint64_t workspace;
  uint32_t alignment[4];
};

// What an algorithm was chosen for, in the place of the real one's opaque words.
struct Algorithm {
  uint64_t words[8];

  static Algorithm of(const Desc& desc, const Layout& a, const Layout& b, const Layout& d,
                      const Preference& preference) {
    return {{a.rows, a.columns, b.columns, d.rows,
             static_cast<uint64_t>(a.stride) << 32 | static_cast<uint64_t>(b.stride),
             static_cast<uint64_t>(d.stride) << 32 | static_cast<uint64_t>(a.type),
             static_cast<uint64_t>(desc.transposed[0]),
             uint64_t{preference.alignment[0]} << 40 | uint64_t{preference.alignment[1]} << 20 |
                 preference.alignment[3]}};
  }
  uint64_t alignment(int shift) const { return words[7] >> shift & 0xFFFFF; }
};

struct Heuristic {
  Algorithm algorithm;
  size_t workspace;
  int state;
  float waves;
  int reserved[4];
};

int64_t products = 0, heuristics = 0;

[[noreturn]] void wrong(const char* what) {
  std::fprintf(stderr, "cublas_lt: %s\n", what);
  std::abort();
}

template <typename T>
int set(const void* value, size_t bytes, T& to) {
  if (!value || bytes != sizeof to) wrong("an attribute of another size");
  std::memcpy(&to, value, sizeof to);
  return kSuccess;
}

bool is_aligned(const void* data, const Layout& layout, uint64_t alignment) {
  const auto address = reinterpret_cast<uintptr_t>(data);
  const auto stride = static_cast<uint64_t>(layout.stride * layout.bytes());
  return alignment > 0 && address % alignment == 0 && stride % alignment == 0;
}

template <typename T>
int make(void** to, const T& object) {
  *to = new T(object);
  return kSuccess;
}

template <typename T>
int destroy(void* object) {
  delete static_cast<T*>(object);
  return kSuccess;
}

}  // namespace

#define EXPORT extern "C" __attribute__((visibility("default")))

// How many products there were, and how often an algorithm was asked for.
EXPORT int64_t fake_products() { return products; }
EXPORT int64_t fake_heuristics() { return heuristics; }

EXPORT int cublasLtCreate(void** handle) { return make(handle, 1); }

EXPORT int cublasLtMatmulDescCreate(void** desc, int compute, int scale) {
  if (compute != 68 || scale != 0) wrong("sums that are not float32");
  return make(desc, Desc{compute, scale, {}});
}
EXPORT int cublasLtMatmulDescSetAttribute(void* desc, int attribute, const void* value,
                                          size_t bytes) {
  if (attribute != 3 && attribute != 4) return kInvalidValue;
  return set(value, bytes, static_cast<Desc*>(desc)->transposed[attribute - 3]);
}
EXPORT int cublasLtMatmulDescDestroy(void* desc) { return destroy<Desc>(desc); }

EXPORT int cublasLtMatrixLayoutCreate(void** layout, int type, uint64_t rows, uint64_t columns,
                                      int64_t stride) {
  if (rows == 0 || columns == 0 || stride < static_cast<int64_t>(rows)) return kInvalidValue;
  return make(layout, Layout{type, rows, columns, stride});
}
EXPORT int cublasLtMatrixLayoutDestroy(void* layout) { return destroy<Layout>(layout); }

EXPORT int cublasLtMatmulPreferenceCreate(void** preference) {
  return make(preference, Preference{0, {256, 256, 256, 256}});
}
EXPORT int cublasLtMatmulPreferenceSetAttribute(void* preference, int attribute, const void* value,
                                                size_t bytes) {
  auto& to = *static_cast<Preference*>(preference);
  if (attribute == 1) return set(value, bytes, to.workspace);
  if (attribute < 5 || attribute > 8) return kInvalidValue;
  return set(value, bytes, to.alignment[attribute - 5]);
}
EXPORT int cublasLtMatmulPreferenceDestroy(void* preference) {
  return destroy<Preference>(preference);
}

// Products of an odd number of columns are not taken: the caller has its own for them.
EXPORT int cublasLtMatmulAlgoGetHeuristic(void*, void* desc, void* a, void* b, void* c, void* d,
                                          void* preference, int asked, void* found, int* count) {
  const auto& first = *static_cast<Layout*>(a);
  const auto& last = *static_cast<Layout*>(d);
  ++heuristics;
  *count = 0;
  if (c != d || asked < 1) wrong("not a product in place");
  if (last.rows % 2) return kNotSupported;
  auto& heuristic = *static_cast<Heuristic*>(found);
  heuristic = {Algorithm::of(*static_cast<Desc*>(desc), first, *static_cast<Layout*>(b), last,
                             *static_cast<Preference*>(preference)),
               1 << 20,
               kSuccess,
               1,
               {}};
  *count = 1;
  return kSuccess;
}

EXPORT int cublasLtMatmul(void*, void* desc, const void* alpha, const void* a, void* a_layout,
                          const void* b, void* b_layout, const void* beta, const void* c,
                          void* c_layout, void* d, void* d_layout, const void* algorithm,
                          void* workspace, size_t workspace_bytes, void*) {
  const auto& how = *static_cast<Desc*>(desc);
  const auto &left = *static_cast<Layout*>(a_layout), &right = *static_cast<Layout*>(b_layout),
             &out = *static_cast<Layout*>(d_layout);
  const auto& chosen = *static_cast<const Algorithm*>(algorithm);
  Preference promised = {
      0,
      {static_cast<uint32_t>(chosen.alignment(40)), static_cast<uint32_t>(chosen.alignment(20)), 0,
       static_cast<uint32_t>(chosen.alignment(0))}};
  const Algorithm expected = Algorithm::of(how, left, right, out, promised);
  if (std::memcmp(&expected, &chosen, sizeof chosen) != 0)
    wrong("an algorithm that was chosen for other matrices");
  if (!is_aligned(a, left, promised.alignment[0]) || !is_aligned(b, right, promised.alignment[1]) ||
      !is_aligned(d, out, promised.alignment[3]))
    wrong("a matrix that is aligned less than was promised");
  if (!workspace || workspace_bytes < 1 << 20 || reinterpret_cast<uintptr_t>(workspace) % 256)
    wrong("a workspace that is too small, or not aligned");
  std::memset(workspace, 0x5A, workspace_bytes);
  const bool transposed = how.transposed[0];
  const auto rows = static_cast<int64_t>(transposed ? left.columns : left.rows);
  const auto inner = static_cast<int64_t>(transposed ? left.rows : left.columns);
  const auto columns = static_cast<int64_t>(right.columns);
  if (how.transposed[1] || left.type != right.type || out.type != 0 ||
      right.rows != static_cast<uint64_t>(inner) || out.rows != static_cast<uint64_t>(rows) ||
      out.columns != right.columns || c != d || c_layout != d_layout)
    wrong("matrices that do not fit each other");
  auto* const to = static_cast<float*>(d);
  const float factor = *static_cast<const float*>(alpha), kept = *static_cast<const float*>(beta);
  for (int64_t n = 0; n < columns; ++n) {
    for (int64_t m = 0; m < rows; ++m) {
      double sum = 0;
      for (int64_t k = 0; k < inner; ++k)
        sum += double{transposed ? left.at(a, k, m) : left.at(a, m, k)} * right.at(b, k, n);
      float& result = to[n * out.stride + m];
      // With a factor of 0 what is there is not read.
      result = static_cast<float>(factor * sum) + (kept == 0 ? 0 : kept * result);
    }
  }
  ++products;
  return kSuccess;
}
