// The ops of many adapters as the dispatcher calls them, in the way of flat.h.
#pragma once

#include <ATen/core/List.h>

#include <array>
#include <tuple>
#include <vector>

#include "common/groups.h"

namespace lora_ext::flat {

// Which gradients a backward is asked for.
struct GroupedWanted {
  bool dx, dbias;
  std::vector<bool> dlora_a, dlora_b;  // for each tensor of these
};

// Gradients of x, of those of lora_a and of lora_b that were asked for, and of the bias.
using GroupedGradients =
    std::tuple<at::Tensor, std::vector<at::Tensor>, std::vector<at::Tensor>, at::Tensor>;

inline std::vector<bool> to_vector(const c10::List<bool>& list) {
  return std::vector<bool>(list.begin(), list.end());
}

using LoraLinearGrouped = at::Tensor(const at::Tensor& x, const Base& base,
                                     const GroupedUpdate& update);
template <LoraLinearGrouped kernel>
at::Tensor lora_linear_grouped(
    const at::Tensor& x, const at::Tensor& weight, at::TensorList lora_a, at::TensorList lora_b,
    const at::Tensor& scaling, const std::optional<at::Tensor>& index,
    const std::optional<at::Tensor>& offs, const std::optional<at::Tensor>& ranks,
    const std::optional<at::Tensor>& bias, double dropout_p, const std::optional<at::Tensor>& seed,
    c10::SymInt row_offset, c10::SymInt col_offset, bool cast_weight,
    const std::optional<at::Tensor>& packed, const std::optional<at::Tensor>& packed_t) {
  return kernel(x, {weight, bias, cast_weight, packed, packed_t},
                {lora_a.vec(),
                 lora_b.vec(),
                 scaling,
                 index,
                 offs,
                 ranks,
                 {dropout_p, seed, std::move(row_offset), std::move(col_offset)}});
}

using LoraLinearGroupedForward = std::tuple<at::Tensor, at::Tensor>(const at::Tensor& x,
                                                                    const Base& base,
                                                                    const GroupedUpdate& update);
template <LoraLinearGroupedForward kernel>
std::tuple<at::Tensor, at::Tensor> lora_linear_grouped_forward(
    const at::Tensor& x, const at::Tensor& weight, at::TensorList lora_a, at::TensorList lora_b,
    const at::Tensor& scaling, const std::optional<at::Tensor>& index,
    const std::optional<at::Tensor>& offs, const std::optional<at::Tensor>& ranks,
    const std::optional<at::Tensor>& bias, double dropout_p, const std::optional<at::Tensor>& seed,
    c10::SymInt row_offset, c10::SymInt col_offset, bool cast_weight,
    const std::optional<at::Tensor>& packed) {
  return kernel(x, {weight, bias, cast_weight, packed},
                {lora_a.vec(),
                 lora_b.vec(),
                 scaling,
                 index,
                 offs,
                 ranks,
                 {dropout_p, seed, std::move(row_offset), std::move(col_offset)}});
}

using LoraLinearGroupedBackward = GroupedGradients(const at::Tensor& grad, const at::Tensor& x,
                                                   const Base& base, const GroupedUpdate& update,
                                                   const at::Tensor& s,
                                                   const GroupedWanted& wanted);
template <LoraLinearGroupedBackward kernel>
GroupedGradients lora_linear_grouped_backward(
    const at::Tensor& grad, const at::Tensor& x, const at::Tensor& weight, at::TensorList lora_a,
    at::TensorList lora_b, const at::Tensor& s, const at::Tensor& scaling,
    const std::optional<at::Tensor>& index, const std::optional<at::Tensor>& offs,
    const std::optional<at::Tensor>& ranks, double dropout_p, const std::optional<at::Tensor>& seed,
    c10::SymInt row_offset, c10::SymInt col_offset, bool cast_weight,
    const std::optional<at::Tensor>& packed_t, std::array<bool, 2> wanted,
    const c10::List<bool>& wanted_a, const c10::List<bool>& wanted_b) {
  return kernel(grad, x, {weight, {}, cast_weight, {}, packed_t},
                {lora_a.vec(),
                 lora_b.vec(),
                 scaling,
                 index,
                 offs,
                 ranks,
                 {dropout_p, seed, std::move(row_offset), std::move(col_offset)}},
                s, {wanted[0], wanted[1], to_vector(wanted_a), to_vector(wanted_b)});
}

using LoraUpdateGrouped = at::Tensor(const at::Tensor& y, const at::Tensor& x,
                                     const GroupedUpdate& update);
template <LoraUpdateGrouped kernel>
at::Tensor lora_update_grouped(const at::Tensor& y, const at::Tensor& x, at::TensorList lora_a,
                               at::TensorList lora_b, const at::Tensor& scaling,
                               const std::optional<at::Tensor>& index,
                               const std::optional<at::Tensor>& offs,
                               const std::optional<at::Tensor>& ranks, double dropout_p,
                               const std::optional<at::Tensor>& seed, c10::SymInt row_offset,
                               c10::SymInt col_offset) {
  return kernel(y, x,
                {lora_a.vec(),
                 lora_b.vec(),
                 scaling,
                 index,
                 offs,
                 ranks,
                 {dropout_p, seed, std::move(row_offset), std::move(col_offset)}});
}

using LoraUpdateGroupedForward = std::tuple<at::Tensor, at::Tensor>(const at::Tensor& y,
                                                                    const at::Tensor& x,
                                                                    const GroupedUpdate& update);
template <LoraUpdateGroupedForward kernel>
std::tuple<at::Tensor, at::Tensor> lora_update_grouped_forward(
    const at::Tensor& y, const at::Tensor& x, at::TensorList lora_a, at::TensorList lora_b,
    const at::Tensor& scaling, const std::optional<at::Tensor>& index,
    const std::optional<at::Tensor>& offs, const std::optional<at::Tensor>& ranks, double dropout_p,
    const std::optional<at::Tensor>& seed, c10::SymInt row_offset, c10::SymInt col_offset) {
  return kernel(y, x,
                {lora_a.vec(),
                 lora_b.vec(),
                 scaling,
                 index,
                 offs,
                 ranks,
                 {dropout_p, seed, std::move(row_offset), std::move(col_offset)}});
}

// Of x, lora_a and lora_b; that of y is grad.
using LoraUpdateGradients =
    std::tuple<at::Tensor, std::vector<at::Tensor>, std::vector<at::Tensor>>;
using LoraUpdateGroupedBackward = LoraUpdateGradients(const at::Tensor& grad, const at::Tensor& x,
                                                      const GroupedUpdate& update,
                                                      const at::Tensor& s,
                                                      const GroupedWanted& wanted);
template <LoraUpdateGroupedBackward kernel>
LoraUpdateGradients lora_update_grouped_backward(
    const at::Tensor& grad, const at::Tensor& x, at::TensorList lora_a, at::TensorList lora_b,
    const at::Tensor& s, const at::Tensor& scaling, const std::optional<at::Tensor>& index,
    const std::optional<at::Tensor>& offs, const std::optional<at::Tensor>& ranks, double dropout_p,
    const std::optional<at::Tensor>& seed, c10::SymInt row_offset, c10::SymInt col_offset,
    bool wanted_x, const c10::List<bool>& wanted_a, const c10::List<bool>& wanted_b) {
  return kernel(grad, x,
                {lora_a.vec(),
                 lora_b.vec(),
                 scaling,
                 index,
                 offs,
                 ranks,
                 {dropout_p, seed, std::move(row_offset), std::move(col_offset)}},
                s, {wanted_x, false, to_vector(wanted_a), to_vector(wanted_b)});
}

}  // namespace lora_ext::flat
