// One projection of a mixture's experts on the CPU, for few rows of each expert, as when a model
// generates: the time of a product is then that of reading the expert's matrix.
//
//     s[m] = x[m] A_e^T,  y[m] = x[m] W_e^T + b_e + scaling * s[m] B_e^T        e: row m's expert
//
// A row has all adapters, or one of its own, or none.
//
// In B the expert is the fastest index. B is read in this layout, once for all experts.
#pragma once

#include <ATen/core/Tensor.h>

#include <algorithm>
#include <optional>
#include <vector>

#include "common/call.h"

namespace lora_ext {

// How the codes of a weight of 4 bits become values: table[code] * scale of its block.
struct FourBitBlocks {
  at::Tensor scale;                 // [E N K / block] float; uint8 if these are codes themselves
  std::optional<at::Tensor> table;  // [16] float
  bool low_first = false;           // as in cpu::FourBitArgs
  int64_t block = 0;                // divides K
  // How scales that are codes become values, as in cpu::NestedScales; else none.
  std::optional<at::Tensor> scale_table, scale_scale, scale_offset;
  int64_t scale_block = 0;

  bool is_nested() const { return scale_table.has_value(); }
};

struct ExpertsArgs {
  at::Tensor x;                     // [M, K], or [T, K] with tokens; last stride 1
  std::optional<at::Tensor> token;  // [M], int64: for each row its index in x
  at::Tensor weight;                // [E, N, K], its stride 1 along N or K; or codes [E, N, K / 2]
  std::optional<FourBitBlocks> blocks;  // of codes
  std::optional<at::Tensor> bias;       // [E, N], contiguous
  // For each adapter [E r, K], where A_e is the r rows from e r on, and [N, r E], where B_e is the
  // columns e + j E. Contiguous.
  std::vector<at::Tensor> lora_a, lora_b;
  std::vector<double> scalings;  // one for each adapter
  std::vector<int64_t> experts;  // the expert of each row
  // The only adapter of each row, or -1; nullopt: each row has all. Some may have rank 0.
  std::optional<std::vector<int64_t>> adapters{};

  int64_t in_features() const { return weight.size(2) * (blocks ? 2 : 1); }
  int64_t rows() const { return static_cast<int64_t>(experts.size()); }
  int64_t rank_of(size_t adapter) const { return lora_a[adapter].size(0) / weight.size(0); }
  // The columns of s.
  int64_t rank() const {
    int64_t sum = 0, most = 0;
    for (size_t i = 0; i < lora_a.size(); ++i) {
      sum += rank_of(i), most = std::max(most, rank_of(i));
    }
    return adapters ? most : sum;
  }
};

namespace cpu {

// Returns y [M, N] in x's dtype, rounded once, and s [M, R] in float32: the S of all adapters side by
// side, or that of the row's own adapter in its first ranks.
Forward experts_few_rows(const ExpertsArgs& args);

// Copies B of some experts, the n in `hit` (int64), to a pool of the grouped op, or a pool to them;
// both contiguous and of one dtype. `out` is the pool if it has 3 dimensions.
//
//     pool[i, m, j] = b[m, j E + e_i]        pool [n, N, r], b [N, r E]: the expert is fastest
void experts_copy(const at::Tensor& out, const at::Tensor& source, const at::Tensor& hit,
                  int64_t experts);

}  // namespace cpu
}  // namespace lora_ext
