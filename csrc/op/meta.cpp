// Shapes and dtypes without data: Meta kernels for torch.compile, export and FakeTensor.
#include <torch/library.h>

#include "op/checks.h"
#include "op/flat.h"
#include "op/flatten.h"
#include "op/meta_parts.h"

namespace lora_ext {
namespace {

// The gradient of a tensor, undefined where it is not wanted.
at::Tensor gradient_of(const at::Tensor& tensor, bool wanted) {
  return wanted ? unfilled_like(tensor) : at::Tensor();
}

std::tuple<at::Tensor, at::Tensor> lora_linear_forward_meta(const at::Tensor& x, const Base& base,
                                                            const Update& update,
                                                            int64_t /*row_block*/) {
  check_forward(x, base, update);
  return {
      unfilled(sym_with_last(x, base.weight.sym_size(0)), x, x.scalar_type()),
      unfilled({sym_rows(x), update.lora_a.sym_size(0)}, x, accumulation_dtype(x.scalar_type()))};
}

at::Tensor lora_linear_meta(const at::Tensor& x, const Base& base, const Update& update,
                            int64_t row_block) {
  return std::get<0>(lora_linear_forward_meta(x, base, update, row_block));
}

std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor> lora_linear_backward_meta(
    const at::Tensor& grad, const at::Tensor& x, const Base& base, const Update& update,
    const at::Tensor& s, std::array<bool, 4> output_mask, int64_t /*row_block*/) {
  check_backward(grad, x, base, update, s);
  at::Tensor dbias;
  if (output_mask[3]) {
    dbias = unfilled({base.weight.sym_size(0)}, grad, accumulation_dtype(x.scalar_type()));
  }
  return {gradient_of(x, output_mask[0]), gradient_of(update.lora_a, output_mask[1]),
          gradient_of(update.lora_b, output_mask[2]), dbias};
}

std::tuple<at::Tensor, at::Tensor> lora_update_forward_meta(const at::Tensor& y,
                                                            const at::Tensor& x,
                                                            const Update& update) {
  check_forward(x, Base::given(y), update);
  return {
      unfilled(y.sym_sizes(), y, y.scalar_type()),
      unfilled({sym_rows(x), update.lora_a.sym_size(0)}, x, accumulation_dtype(x.scalar_type()))};
}

at::Tensor lora_update_meta(const at::Tensor& y, const at::Tensor& x, const Update& update) {
  return std::get<0>(lora_update_forward_meta(y, x, update));
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> lora_update_backward_meta(
    const at::Tensor& grad, const at::Tensor& x, const Update& update, const at::Tensor& s,
    std::array<bool, 3> output_mask) {
  check_backward(grad, x, Base::given(), update, s);
  return {gradient_of(x, output_mask[0]), gradient_of(update.lora_a, output_mask[1]),
          gradient_of(update.lora_b, output_mask[2])};
}

at::Tensor dropout_mask_meta(const at::Tensor& seed, c10::SymInt rows, c10::SymInt cols,
                             double dropout_p, c10::SymInt row_offset, c10::SymInt col_offset) {
  check_dropout_mask(seed, rows, cols, dropout_p, row_offset, col_offset);
  return unfilled({rows, cols}, seed, at::kBool);
}

}  // namespace

TORCH_LIBRARY_IMPL(lora_ext, Meta, m) {
  m.impl("lora_linear", TORCH_FN(flat::lora_linear<lora_linear_meta>));
  m.impl("lora_linear_forward", TORCH_FN(flat::lora_linear_forward<lora_linear_forward_meta>));
  m.impl("lora_linear_backward", TORCH_FN(flat::lora_linear_backward<lora_linear_backward_meta>));
  m.impl("lora_update", TORCH_FN(flat::lora_update<lora_update_meta>));
  m.impl("lora_update_forward", TORCH_FN(flat::lora_update_forward<lora_update_forward_meta>));
  m.impl("lora_update_backward", TORCH_FN(flat::lora_update_backward<lora_update_backward_meta>));
  m.impl("dropout_mask", TORCH_FN(dropout_mask_meta));
}

}  // namespace lora_ext
