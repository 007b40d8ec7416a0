// Checks of the arguments of lora_linear, lora_update and of masks, on real and on symbolic
// shapes. The values of index, offs and ranks are not read here: common/rows.h checks them on the
// host, and kernels on a GPU treat a number that is out of range as "no adapter".
#pragma once

#include <vector>

#include "op/ops.h"

namespace lora_ext {

// The sizes of a tensor of shape [..., C] with another C.
inline std::vector<c10::SymInt> sym_with_last(const at::Tensor& tensor, const c10::SymInt& last) {
  std::vector<c10::SymInt> sizes = tensor.sym_sizes().vec();
  sizes.back() = last;
  return sizes;
}

// M of a tensor of shape [..., C].
inline c10::SymInt sym_rows(const at::Tensor& tensor) {
  c10::SymInt rows = 1;
  for (int64_t dim = 0; dim < tensor.dim() - 1; ++dim) rows = rows * tensor.sym_size(dim);
  return rows;
}

void check_forward(const at::Tensor& x, const Base& base, const Update& update);

// grad is dY [..., N], s is S [M, r].
void check_backward(const at::Tensor& grad, const at::Tensor& s, const Wanted& wanted,
                    const at::Tensor& x, const Base& base, const Update& update);

// The dtype must be float64, float32, bfloat16 or float16.
void check_supported(const char* op, const char* name, at::ScalarType dtype);

// The seed, shape, probability and offsets of a mask.
void check_dropout_mask(const char* op, const at::Tensor& seed, const c10::SymInt& rows,
                        const c10::SymInt& cols, double dropout_p,
                        const c10::SymInt& row_offset = 0, const c10::SymInt& col_offset = 0);

}  // namespace lora_ext
