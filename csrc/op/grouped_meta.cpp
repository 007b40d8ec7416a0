// Shapes and dtypes without data of the ops of many adapters, in the way of meta.cpp.
#include <torch/library.h>

#include "op/flatten.h"
#include "op/grouped_checks.h"
#include "op/grouped_flat.h"
#include "op/meta_parts.h"

namespace lora_ext {
namespace {

at::Tensor unfilled_s(const at::Tensor& x, const GroupedUpdate& update) {
  return unfilled({sym_rows(x), update.sym_max_rank()}, x, accumulation_dtype(x.scalar_type()));
}

std::vector<at::Tensor> unfilled_of(const std::vector<at::Tensor>& factors,
                                    const std::vector<bool>& wanted) {
  std::vector<at::Tensor> out;
  for (size_t i = 0; i < factors.size(); ++i) {
    if (wanted[i]) out.push_back(unfilled_like(factors[i]));
  }
  return out;
}

std::tuple<at::Tensor, at::Tensor> lora_linear_grouped_forward_meta(const at::Tensor& x,
                                                                    const Base& base,
                                                                    const GroupedUpdate& update) {
  check_grouped_forward(x, base, update);
  return {unfilled(sym_with_last(x, base.weight.sym_size(0)), x, x.scalar_type()),
          unfilled_s(x, update)};
}

at::Tensor lora_linear_grouped_meta(const at::Tensor& x, const Base& base,
                                    const GroupedUpdate& update) {
  return std::get<0>(lora_linear_grouped_forward_meta(x, base, update));
}

flat::GroupedGradients lora_linear_grouped_backward_meta(const at::Tensor& grad,
                                                         const at::Tensor& x, const Base& base,
                                                         const GroupedUpdate& update,
                                                         const at::Tensor& s,
                                                         const flat::GroupedWanted& wanted) {
  check_grouped_backward(grad, x, base, update, s, wanted.dlora_a.size(), wanted.dlora_b.size());
  at::Tensor dbias;
  if (wanted.dbias) {
    dbias = unfilled({base.weight.sym_size(0)}, grad, accumulation_dtype(x.scalar_type()));
  }
  return {wanted.dx ? unfilled_like(x) : at::Tensor(), unfilled_of(update.lora_a, wanted.dlora_a),
          unfilled_of(update.lora_b, wanted.dlora_b), dbias};
}

std::tuple<at::Tensor, at::Tensor> lora_update_grouped_forward_meta(const at::Tensor& y,
                                                                    const at::Tensor& x,
                                                                    const GroupedUpdate& update) {
  check_grouped_forward(x, Base::given(y), update);
  return {unfilled_like(y), unfilled_s(x, update)};
}

at::Tensor lora_update_grouped_meta(const at::Tensor& y, const at::Tensor& x,
                                    const GroupedUpdate& update) {
  return std::get<0>(lora_update_grouped_forward_meta(y, x, update));
}

flat::LoraUpdateGradients lora_update_grouped_backward_meta(const at::Tensor& grad,
                                                            const at::Tensor& x,
                                                            const GroupedUpdate& update,
                                                            const at::Tensor& s,
                                                            const flat::GroupedWanted& wanted) {
  check_grouped_backward(grad, x, Base::given(), update, s, wanted.dlora_a.size(),
                         wanted.dlora_b.size());
  return {wanted.dx ? unfilled_like(x) : at::Tensor(), unfilled_of(update.lora_a, wanted.dlora_a),
          unfilled_of(update.lora_b, wanted.dlora_b)};
}

}  // namespace

TORCH_LIBRARY_IMPL(lora_ext, Meta, m) {
  m.impl("lora_linear_grouped", TORCH_FN(flat::lora_linear_grouped<lora_linear_grouped_meta>));
  m.impl("lora_linear_grouped_forward",
         TORCH_FN(flat::lora_linear_grouped_forward<lora_linear_grouped_forward_meta>));
  m.impl("lora_linear_grouped_backward",
         TORCH_FN(flat::lora_linear_grouped_backward<lora_linear_grouped_backward_meta>));
  m.impl("lora_update_grouped", TORCH_FN(flat::lora_update_grouped<lora_update_grouped_meta>));
  m.impl("lora_update_grouped_forward",
         TORCH_FN(flat::lora_update_grouped_forward<lora_update_grouped_forward_meta>));
  m.impl("lora_update_grouped_backward",
         TORCH_FN(flat::lora_update_grouped_backward<lora_update_grouped_backward_meta>));
}

}  // namespace lora_ext
