// One projection of a mixture's experts on the CPU, for so few rows of each expert that its product
// is a read of its matrix, as when a model generates:
//
//     s[m] = x[m] A_e^T,  y[m] = x[m] W_e^T + b_e + scaling * s[m] B_e^T        e: row m's expert
//
// B has the expert as its fastest index. It is read as it lies, once for all experts.
#pragma once

#include <ATen/core/Tensor.h>

#include <optional>
#include <vector>

#include "common/call.h"

namespace lora_ext {

struct ExpertsArgs {
  at::Tensor x;                     // [M, K], or [T, K] with tokens; last stride 1
  std::optional<at::Tensor> token;  // [M], int64: where in x each row is
  at::Tensor weight;                // [E, N, K], its stride 1 along N or K
  std::optional<at::Tensor> bias;   // [E, N], contiguous
  // Of each adapter [E r, K], A_e the rows from e r on; and [N, r E], B_e the columns e + j E.
  // Contiguous.
  std::vector<at::Tensor> lora_a, lora_b;
  std::vector<double> scalings;  // one for each adapter
  std::vector<int64_t> experts;  // of each row

  int64_t rows() const { return static_cast<int64_t>(experts.size()); }
  int64_t rank_of(size_t adapter) const { return lora_a[adapter].size(0) / weight.size(0); }
  int64_t rank() const {
    int64_t sum = 0;
    for (size_t i = 0; i < lora_a.size(); ++i) sum += rank_of(i);
    return sum;
  }
};

namespace cpu {

// y [M, N] of the weight's dtype, rounded once, and s [M, R] in float32, of all adapters side by
// side.
Forward experts_few_rows(const ExpertsArgs& args);

}  // namespace cpu
}  // namespace lora_ext
