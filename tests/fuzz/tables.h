// Lists of matrices: tables, what they mix, and its gradients.
#ifndef NABLA_FAST_FUZZ_TABLES_H_
#define NABLA_FAST_FUZZ_TABLES_H_

#include <cstdint>
#include <vector>

#include "call.h"
#include "fuzz.h"
#include "tensor.h"

namespace fuzz {

// Widths of some tables.
inline std::vector<int64_t> table_widths(Random& random) {
  std::vector<int64_t> widths;
  for (int64_t left = random.between(0, 3); left > 0; --left)
    widths.push_back(random.one_in(15) ? 0 : random.between(1, 150));
  return widths;
}

// Matrices of the widths, and the list of them that a call is given.
template <typename Field>
struct MatrixList {
  std::vector<Matrix> matrices;
  List<Field> fields;

  // rows[t]: of matrix t.
  MatrixList(Random& random, Values& values, const std::vector<int64_t>& rows,
             const std::vector<int64_t>& widths, bool floats)
      : fields(random, static_cast<int64_t>(widths.size())) {
    for (size_t t = 0; t < widths.size(); ++t) {
      const nabla_fast_dtype of = floats ? NABLA_FAST_FLOAT32 : fuzz::dtype(random);
      matrices.emplace_back(random, rows[t], widths[t], of);
      matrices.back().plain(values);
    }
  }
  MatrixList(Random& random, Values& values, int64_t rows, const std::vector<int64_t>& widths,
             bool floats = false)
      : MatrixList(random, values, std::vector<int64_t>(widths.size(), rows), widths, floats) {}

  template <typename Args>
  void give(Call<Args>& call, By by, const Field*& list) {
    for (size_t t = 0; t < matrices.size(); ++t) {
      Field& field = fields[static_cast<int64_t>(t)];
      if constexpr (std::is_same_v<Field, nabla_fast_output>)
        call.writes(by, field, matrices[t].tensor());
      else
        call.reads(by, field, matrices[t]);
    }
    fields.seal();
    call.reads(By::kOthers, list, fields).stays = true;
  }
};

}  // namespace fuzz

#endif  // NABLA_FAST_FUZZ_TABLES_H_
