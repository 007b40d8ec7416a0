// Shapes and dtypes without data: Meta kernels for torch.compile, export and FakeTensor.
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include "op/checks.h"
#include "op/flatten.h"
#include "op/ops.h"

namespace lora_ext {
namespace {

at::Tensor unfilled(c10::SymIntArrayRef sizes, const at::Tensor& like, at::ScalarType dtype) {
  return at::empty_symint(sizes, like.options().dtype(dtype));
}

at::Tensor unfilled_like(const at::Tensor& tensor) {
  return unfilled(tensor.sym_sizes(), tensor, tensor.scalar_type());
}

std::vector<at::Tensor> unfilled_of(at::TensorList factors, const Wishes& wanted) {
  std::vector<at::Tensor> out;
  for (size_t i = 0; i < factors.size(); ++i) {
    if (wanted[i]) out.push_back(unfilled_like(factors[i]));
  }
  return out;
}

std::tuple<at::Tensor, at::Tensor> lora_forward_meta(const at::Tensor& x, const Base& base,
                                                     const Update& update) {
  check_forward(x, base, update);
  return {base.is_given() ? unfilled_like(base.y)
                          : unfilled(sym_with_last(x, base.weight.sym_size(0)), x, x.scalar_type()),
          unfilled({sym_rows(x), update.sym_rank()}, x, accumulation_dtype(x.scalar_type()))};
}

at::Tensor lora_meta(const at::Tensor& x, const Base& base, const Update& update) {
  return std::get<0>(lora_forward_meta(x, base, update));
}

Gradients lora_backward_meta(const at::Tensor& grad, const at::Tensor& s, const Wanted& wanted,
                             const at::Tensor& x, const Base& base, const Update& update) {
  check_backward(grad, s, wanted, x, base, update);
  at::Tensor dbias;
  if (wanted.dbias) {
    dbias = unfilled({base.weight.sym_size(0)}, grad, accumulation_dtype(x.scalar_type()));
  }
  return {wanted.dx ? unfilled_like(x) : at::Tensor(), unfilled_of(update.lora_a, wanted.dlora_a),
          unfilled_of(update.lora_b, wanted.dlora_b), dbias};
}

at::Tensor dropout_mask_meta(const at::Tensor& seed, c10::SymInt rows, c10::SymInt cols,
                             double dropout_p, c10::SymInt row_offset, c10::SymInt col_offset) {
  check_dropout_mask(seed, rows, cols, dropout_p, row_offset, col_offset);
  return unfilled({rows, cols}, seed, at::kBool);
}

}  // namespace

TORCH_LIBRARY_IMPL(lora_ext, Meta, m) {
  m.impl("lora", TORCH_FN(Lora::flat<lora_meta>));
  m.impl("lora_grouped", TORCH_FN(LoraGrouped::flat<lora_meta>));
  m.impl("lora_forward", TORCH_FN(LoraForward::flat<lora_forward_meta>));
  m.impl("lora_grouped_forward", TORCH_FN(LoraGroupedForward::flat<lora_forward_meta>));
  m.impl("lora_backward", TORCH_FN(LoraBackward::flat<backward_of_one<lora_backward_meta>>));
  m.impl("lora_grouped_backward",
         TORCH_FN(LoraGroupedBackward::flat<backward_of_many<lora_backward_meta>>));
  m.impl("dropout_mask", TORCH_FN(dropout_mask_meta));
}

}  // namespace lora_ext
