// Shapes and dtypes without data: Meta kernels for torch.compile, export and FakeTensor.
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include "common/call.h"
#include "op/checks.h"
#include "op/ops.h"

namespace lora_ext {
namespace {

std::vector<c10::SymInt> with_last(const at::Tensor& tensor, const c10::SymInt& last) {
  std::vector<c10::SymInt> sizes = tensor.sym_sizes().vec();
  sizes.back() = last;
  return sizes;
}

c10::SymInt rows_of(const at::Tensor& x) {
  c10::SymInt rows = 1;
  for (int64_t dim = 0; dim < x.dim() - 1; ++dim) rows = rows * x.sym_size(dim);
  return rows;
}

at::Tensor empty(c10::SymIntArrayRef sizes, const at::Tensor& like, at::ScalarType dtype) {
  return at::empty_symint(sizes, like.options().dtype(dtype));
}

std::tuple<at::Tensor, at::Tensor> lora_linear_forward_meta(
    const at::Tensor& x, const at::Tensor& weight, const at::Tensor& lora_a,
    const at::Tensor& lora_b, const std::optional<at::Tensor>& bias, double scaling,
    double dropout_p, const std::optional<at::Tensor>& seed, c10::SymInt row_offset,
    c10::SymInt col_offset, bool cast_weight, const std::optional<at::Tensor>& /*packed*/) {
  check_forward(x, weight, lora_a, lora_b, bias, scaling, dropout_p, seed, row_offset, col_offset,
                cast_weight);
  return {empty(with_last(x, weight.sym_size(0)), x, x.scalar_type()),
          empty({rows_of(x), lora_a.sym_size(0)}, x, accumulation_dtype(x.scalar_type()))};
}

at::Tensor lora_linear_meta(const at::Tensor& x, const at::Tensor& weight, const at::Tensor& lora_a,
                            const at::Tensor& lora_b, const std::optional<at::Tensor>& bias,
                            double scaling, double dropout_p, const std::optional<at::Tensor>& seed,
                            c10::SymInt row_offset, c10::SymInt col_offset, bool cast_weight,
                            const std::optional<at::Tensor>& packed,
                            const std::optional<at::Tensor>& /*packed_t*/) {
  return std::get<0>(lora_linear_forward_meta(x, weight, lora_a, lora_b, bias, scaling, dropout_p,
                                              seed, row_offset, col_offset, cast_weight, packed));
}

std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor> lora_linear_backward_meta(
    const at::Tensor& grad, const at::Tensor& x, const at::Tensor& weight, const at::Tensor& lora_a,
    const at::Tensor& lora_b, const at::Tensor& s, double scaling, double dropout_p,
    const std::optional<at::Tensor>& seed, c10::SymInt row_offset, c10::SymInt col_offset,
    bool cast_weight, const std::optional<at::Tensor>& /*packed_t*/,
    std::array<bool, 4> output_mask) {
  check_backward(grad, x, weight, lora_a, lora_b, s, scaling, dropout_p, seed, row_offset,
                 col_offset, cast_weight);
  at::Tensor dx, dlora_a, dlora_b, dbias;
  if (output_mask[0]) dx = empty(x.sym_sizes(), x, x.scalar_type());
  if (output_mask[1]) dlora_a = empty(lora_a.sym_sizes(), lora_a, lora_a.scalar_type());
  if (output_mask[2]) dlora_b = empty(lora_b.sym_sizes(), lora_b, lora_b.scalar_type());
  if (output_mask[3]) {
    dbias = empty({weight.sym_size(0)}, grad, accumulation_dtype(x.scalar_type()));
  }
  return {dx, dlora_a, dlora_b, dbias};
}

at::Tensor dropout_mask_meta(const at::Tensor& seed, c10::SymInt rows, c10::SymInt cols,
                             double dropout_p, c10::SymInt row_offset, c10::SymInt col_offset) {
  check_dropout_mask(seed, rows, cols, dropout_p, row_offset, col_offset);
  return empty({rows, cols}, seed, at::kBool);
}

}  // namespace

TORCH_LIBRARY_IMPL(lora_ext, Meta, m) {
  m.impl("lora_linear", TORCH_FN(lora_linear_meta));
  m.impl("lora_linear_forward", TORCH_FN(lora_linear_forward_meta));
  m.impl("lora_linear_backward", TORCH_FN(lora_linear_backward_meta));
  m.impl("dropout_mask", TORCH_FN(dropout_mask_meta));
}

}  // namespace lora_ext
