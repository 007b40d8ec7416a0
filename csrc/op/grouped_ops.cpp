// Schemas of the ops of many adapters, and typed calls through the dispatcher.
#include "op/grouped_ops.h"

#include <torch/library.h>

#include "op/find_op.h"

namespace lora_ext::ops {

// lora_linear and lora_update with an adapter for each row. lora_a and lora_b are lists of matrices
// or one pool each; index or offs says which adapter a row has.
TORCH_LIBRARY_FRAGMENT(lora_ext, m) {
  const std::vector<at::Tag> tags = {at::Tag::pt2_compliant_tag};
  m.def(
      "lora_linear_grouped(Tensor x, Tensor weight, Tensor[] lora_a, Tensor[] lora_b, "
      "Tensor scaling, Tensor? index=None, Tensor? offs=None, Tensor? ranks=None, "
      "Tensor? bias=None, float dropout_p=0.0, Tensor? seed=None, SymInt row_offset=0, "
      "SymInt col_offset=0, bool cast_weight=False, Tensor? packed=None, Tensor? packed_t=None) "
      "-> Tensor",
      tags);
  m.def(
      "lora_linear_grouped_forward(Tensor x, Tensor weight, Tensor[] lora_a, Tensor[] lora_b, "
      "Tensor scaling, Tensor? index, Tensor? offs, Tensor? ranks, Tensor? bias, float dropout_p, "
      "Tensor? seed, SymInt row_offset, SymInt col_offset, bool cast_weight, Tensor? packed) "
      "-> (Tensor, Tensor)",
      tags);
  m.def(
      "lora_linear_grouped_backward(Tensor grad, Tensor x, Tensor weight, Tensor[] lora_a, "
      "Tensor[] lora_b, Tensor s, Tensor scaling, Tensor? index, Tensor? offs, Tensor? ranks, "
      "float dropout_p, Tensor? seed, SymInt row_offset, SymInt col_offset, bool cast_weight, "
      "Tensor? packed_t, bool[2] wanted, bool[] wanted_a, bool[] wanted_b) "
      "-> (Tensor, Tensor[], Tensor[], Tensor)",
      tags);
  m.def(
      "lora_update_grouped(Tensor y, Tensor x, Tensor[] lora_a, Tensor[] lora_b, Tensor scaling, "
      "Tensor? index=None, Tensor? offs=None, Tensor? ranks=None, float dropout_p=0.0, "
      "Tensor? seed=None, SymInt row_offset=0, SymInt col_offset=0) -> Tensor",
      tags);
  m.def(
      "lora_update_grouped_forward(Tensor y, Tensor x, Tensor[] lora_a, Tensor[] lora_b, "
      "Tensor scaling, Tensor? index, Tensor? offs, Tensor? ranks, float dropout_p, Tensor? seed, "
      "SymInt row_offset, SymInt col_offset) -> (Tensor, Tensor)",
      tags);
  m.def(
      "lora_update_grouped_backward(Tensor grad, Tensor x, Tensor[] lora_a, Tensor[] lora_b, "
      "Tensor s, Tensor scaling, Tensor? index, Tensor? offs, Tensor? ranks, float dropout_p, "
      "Tensor? seed, SymInt row_offset, SymInt col_offset, bool wanted_x, bool[] wanted_a, "
      "bool[] wanted_b) -> (Tensor, Tensor[], Tensor[])",
      tags);
}

namespace {

c10::List<bool> to_list(const std::vector<bool>& values) {
  c10::List<bool> list;
  for (const bool value : values) list.push_back(value);
  return list;
}

}  // namespace

at::Tensor lora_linear_grouped(const at::Tensor& x, const Base& base, const GroupedUpdate& u) {
  static const auto op =
      find<decltype(flat::lora_linear_grouped<nullptr>)>("lora_ext::lora_linear_grouped");
  return op.call(x, base.weight, u.lora_a, u.lora_b, u.scaling, u.index, u.offs, u.ranks, base.bias,
                 u.dropout.p, u.dropout.seed, u.dropout.row_offset, u.dropout.col_offset,
                 base.cast_weight, base.packed, base.packed_t);
}

std::tuple<at::Tensor, at::Tensor> lora_linear_grouped_forward(const at::Tensor& x,
                                                               const Base& base,
                                                               const GroupedUpdate& u) {
  static const auto op = find<decltype(flat::lora_linear_grouped_forward<nullptr>)>(
      "lora_ext::lora_linear_grouped_forward");
  return op.call(x, base.weight, u.lora_a, u.lora_b, u.scaling, u.index, u.offs, u.ranks, base.bias,
                 u.dropout.p, u.dropout.seed, u.dropout.row_offset, u.dropout.col_offset,
                 base.cast_weight, base.packed);
}

flat::GroupedGradients lora_linear_grouped_backward(const at::Tensor& grad, const at::Tensor& x,
                                                    const Base& base, const GroupedUpdate& u,
                                                    const at::Tensor& s,
                                                    const flat::GroupedWanted& wanted) {
  static const auto op = find<decltype(flat::lora_linear_grouped_backward<nullptr>)>(
      "lora_ext::lora_linear_grouped_backward");
  return op.call(grad, x, base.weight, u.lora_a, u.lora_b, s, u.scaling, u.index, u.offs, u.ranks,
                 u.dropout.p, u.dropout.seed, u.dropout.row_offset, u.dropout.col_offset,
                 base.cast_weight, base.packed_t, {wanted.dx, wanted.dbias},
                 to_list(wanted.dlora_a), to_list(wanted.dlora_b));
}

at::Tensor lora_update_grouped(const at::Tensor& y, const at::Tensor& x, const GroupedUpdate& u) {
  static const auto op =
      find<decltype(flat::lora_update_grouped<nullptr>)>("lora_ext::lora_update_grouped");
  return op.call(y, x, u.lora_a, u.lora_b, u.scaling, u.index, u.offs, u.ranks, u.dropout.p,
                 u.dropout.seed, u.dropout.row_offset, u.dropout.col_offset);
}

std::tuple<at::Tensor, at::Tensor> lora_update_grouped_forward(const at::Tensor& y,
                                                               const at::Tensor& x,
                                                               const GroupedUpdate& u) {
  static const auto op = find<decltype(flat::lora_update_grouped_forward<nullptr>)>(
      "lora_ext::lora_update_grouped_forward");
  return op.call(y, x, u.lora_a, u.lora_b, u.scaling, u.index, u.offs, u.ranks, u.dropout.p,
                 u.dropout.seed, u.dropout.row_offset, u.dropout.col_offset);
}

flat::LoraUpdateGradients lora_update_grouped_backward(const at::Tensor& grad, const at::Tensor& x,
                                                       const GroupedUpdate& u, const at::Tensor& s,
                                                       const flat::GroupedWanted& wanted) {
  static const auto op = find<decltype(flat::lora_update_grouped_backward<nullptr>)>(
      "lora_ext::lora_update_grouped_backward");
  return op.call(grad, x, u.lora_a, u.lora_b, s, u.scaling, u.index, u.offs, u.ranks, u.dropout.p,
                 u.dropout.seed, u.dropout.row_offset, u.dropout.col_offset, wanted.dx,
                 to_list(wanted.dlora_a), to_list(wanted.dlora_b));
}

}  // namespace lora_ext::ops
