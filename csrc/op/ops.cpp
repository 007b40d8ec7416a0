// Schemas of the torch library `lora_ext` and typed calls through the dispatcher.
#include "op/ops.h"

#include <torch/library.h>

#include "op/find_op.h"
#include "op/flat.h"

namespace lora_ext::ops {

// lora_linear and lora_update are the public ops: pure in (seed, row_offset, col_offset),
// differentiable in x, lora_a, lora_b and bias or y. Their forward and backward are what the
// autograd Function calls.
TORCH_LIBRARY(lora_ext, m) {
  m.set_python_module("lora_ext");
  const std::vector<at::Tag> tags = {at::Tag::pt2_compliant_tag};
  m.def(
      "lora_linear(Tensor x, Tensor weight, Tensor lora_a, Tensor lora_b, Tensor? bias=None, "
      "float scaling=1.0, float dropout_p=0.0, Tensor? seed=None, SymInt row_offset=0, "
      "SymInt col_offset=0, bool cast_weight=False, Tensor? packed=None, Tensor? packed_t=None, "
      "int row_block=0) -> Tensor",
      tags);
  m.def(
      "lora_linear_forward(Tensor x, Tensor weight, Tensor lora_a, Tensor lora_b, Tensor? bias, "
      "float scaling, float dropout_p, Tensor? seed, SymInt row_offset, SymInt col_offset, "
      "bool cast_weight, Tensor? packed, int row_block=0) -> (Tensor, Tensor)",
      tags);
  m.def(
      "lora_linear_backward(Tensor grad, Tensor x, Tensor weight, Tensor lora_a, Tensor lora_b, "
      "Tensor s, float scaling, float dropout_p, Tensor? seed, SymInt row_offset, "
      "SymInt col_offset, bool cast_weight, Tensor? packed_t, bool[4] output_mask, int "
      "row_block=0) "
      "-> (Tensor, Tensor, Tensor, Tensor)",
      tags);
  m.def(
      "lora_update(Tensor y, Tensor x, Tensor lora_a, Tensor lora_b, float scaling=1.0, "
      "float dropout_p=0.0, Tensor? seed=None, SymInt row_offset=0, SymInt col_offset=0) -> Tensor",
      tags);
  m.def(
      "lora_update_forward(Tensor y, Tensor x, Tensor lora_a, Tensor lora_b, float scaling, "
      "float dropout_p, Tensor? seed, SymInt row_offset, SymInt col_offset) -> (Tensor, Tensor)",
      tags);
  m.def(
      "lora_update_backward(Tensor grad, Tensor x, Tensor lora_a, Tensor lora_b, Tensor s, "
      "float scaling, float dropout_p, Tensor? seed, SymInt row_offset, SymInt col_offset, "
      "bool[3] output_mask) -> (Tensor, Tensor, Tensor)",
      tags);
  m.def(
      "dropout_mask(Tensor seed, SymInt rows, SymInt cols, float dropout_p, SymInt row_offset=0, "
      "SymInt col_offset=0) -> Tensor",
      tags);
}

at::Tensor lora_linear(const at::Tensor& x, const Base& base, const Update& u, int64_t row_block) {
  static const auto op = find<decltype(flat::lora_linear<nullptr>)>("lora_ext::lora_linear");
  return op.call(x, base.weight, u.lora_a, u.lora_b, base.bias, u.scaling, u.dropout.p,
                 u.dropout.seed, u.dropout.row_offset, u.dropout.col_offset, base.cast_weight,
                 base.packed, base.packed_t, row_block);
}

std::tuple<at::Tensor, at::Tensor> lora_linear_forward(const at::Tensor& x, const Base& base,
                                                       const Update& u, int64_t row_block) {
  static const auto op =
      find<decltype(flat::lora_linear_forward<nullptr>)>("lora_ext::lora_linear_forward");
  return op.call(x, base.weight, u.lora_a, u.lora_b, base.bias, u.scaling, u.dropout.p,
                 u.dropout.seed, u.dropout.row_offset, u.dropout.col_offset, base.cast_weight,
                 base.packed, row_block);
}

std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor> lora_linear_backward(
    const at::Tensor& grad, const at::Tensor& x, const Base& base, const Update& u,
    const at::Tensor& s, std::array<bool, 4> output_mask, int64_t row_block) {
  static const auto op =
      find<decltype(flat::lora_linear_backward<nullptr>)>("lora_ext::lora_linear_backward");
  return op.call(grad, x, base.weight, u.lora_a, u.lora_b, s, u.scaling, u.dropout.p,
                 u.dropout.seed, u.dropout.row_offset, u.dropout.col_offset, base.cast_weight,
                 base.packed_t, output_mask, row_block);
}

at::Tensor lora_update(const at::Tensor& y, const at::Tensor& x, const Update& u) {
  static const auto op = find<decltype(flat::lora_update<nullptr>)>("lora_ext::lora_update");
  return op.call(y, x, u.lora_a, u.lora_b, u.scaling, u.dropout.p, u.dropout.seed,
                 u.dropout.row_offset, u.dropout.col_offset);
}

std::tuple<at::Tensor, at::Tensor> lora_update_forward(const at::Tensor& y, const at::Tensor& x,
                                                       const Update& u) {
  static const auto op =
      find<decltype(flat::lora_update_forward<nullptr>)>("lora_ext::lora_update_forward");
  return op.call(y, x, u.lora_a, u.lora_b, u.scaling, u.dropout.p, u.dropout.seed,
                 u.dropout.row_offset, u.dropout.col_offset);
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> lora_update_backward(
    const at::Tensor& grad, const at::Tensor& x, const Update& u, const at::Tensor& s,
    std::array<bool, 3> output_mask) {
  static const auto op =
      find<decltype(flat::lora_update_backward<nullptr>)>("lora_ext::lora_update_backward");
  return op.call(grad, x, u.lora_a, u.lora_b, s, u.scaling, u.dropout.p, u.dropout.seed,
                 u.dropout.row_offset, u.dropout.col_offset, output_mask);
}

}  // namespace lora_ext::ops
