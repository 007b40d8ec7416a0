// The ops as the dispatcher calls them. A schema has flat arguments; here they become the values of
// common/call.h, for every backend: flat::op<kernel> is what TORCH_LIBRARY_IMPL registers for a
// kernel that takes values.
#pragma once

#include <array>
#include <tuple>

#include "common/call.h"

namespace lora_ext::flat {

using LoraLinear = at::Tensor(const at::Tensor& x, const Base& base, const Update& update,
                              int64_t row_block);
template <LoraLinear kernel>
at::Tensor lora_linear(const at::Tensor& x, const at::Tensor& weight, const at::Tensor& lora_a,
                       const at::Tensor& lora_b, const std::optional<at::Tensor>& bias,
                       double scaling, double dropout_p, const std::optional<at::Tensor>& seed,
                       c10::SymInt row_offset, c10::SymInt col_offset, bool cast_weight,
                       const std::optional<at::Tensor>& packed,
                       const std::optional<at::Tensor>& packed_t, int64_t row_block) {
  return kernel(
      x, {weight, bias, cast_weight, packed, packed_t},
      {lora_a, lora_b, scaling, {dropout_p, seed, std::move(row_offset), std::move(col_offset)}},
      row_block);
}

using LoraLinearForward = std::tuple<at::Tensor, at::Tensor>(const at::Tensor& x, const Base& base,
                                                             const Update& update,
                                                             int64_t row_block);
template <LoraLinearForward kernel>
std::tuple<at::Tensor, at::Tensor> lora_linear_forward(
    const at::Tensor& x, const at::Tensor& weight, const at::Tensor& lora_a,
    const at::Tensor& lora_b, const std::optional<at::Tensor>& bias, double scaling,
    double dropout_p, const std::optional<at::Tensor>& seed, c10::SymInt row_offset,
    c10::SymInt col_offset, bool cast_weight, const std::optional<at::Tensor>& packed,
    int64_t row_block) {
  return kernel(
      x, {weight, bias, cast_weight, packed},
      {lora_a, lora_b, scaling, {dropout_p, seed, std::move(row_offset), std::move(col_offset)}},
      row_block);
}

using LoraLinearBackward = std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor>(
    const at::Tensor& grad, const at::Tensor& x, const Base& base, const Update& update,
    const at::Tensor& s, std::array<bool, 4> output_mask, int64_t row_block);
template <LoraLinearBackward kernel>
std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor> lora_linear_backward(
    const at::Tensor& grad, const at::Tensor& x, const at::Tensor& weight, const at::Tensor& lora_a,
    const at::Tensor& lora_b, const at::Tensor& s, double scaling, double dropout_p,
    const std::optional<at::Tensor>& seed, c10::SymInt row_offset, c10::SymInt col_offset,
    bool cast_weight, const std::optional<at::Tensor>& packed_t, std::array<bool, 4> output_mask,
    int64_t row_block) {
  return kernel(
      grad, x, {weight, {}, cast_weight, {}, packed_t},
      {lora_a, lora_b, scaling, {dropout_p, seed, std::move(row_offset), std::move(col_offset)}}, s,
      output_mask, row_block);
}

using LoraUpdate = at::Tensor(const at::Tensor& y, const at::Tensor& x, const Update& update);
template <LoraUpdate kernel>
at::Tensor lora_update(const at::Tensor& y, const at::Tensor& x, const at::Tensor& lora_a,
                       const at::Tensor& lora_b, double scaling, double dropout_p,
                       const std::optional<at::Tensor>& seed, c10::SymInt row_offset,
                       c10::SymInt col_offset) {
  return kernel(
      y, x,
      {lora_a, lora_b, scaling, {dropout_p, seed, std::move(row_offset), std::move(col_offset)}});
}

using LoraUpdateForward = std::tuple<at::Tensor, at::Tensor>(const at::Tensor& y,
                                                             const at::Tensor& x,
                                                             const Update& update);
template <LoraUpdateForward kernel>
std::tuple<at::Tensor, at::Tensor> lora_update_forward(
    const at::Tensor& y, const at::Tensor& x, const at::Tensor& lora_a, const at::Tensor& lora_b,
    double scaling, double dropout_p, const std::optional<at::Tensor>& seed, c10::SymInt row_offset,
    c10::SymInt col_offset) {
  return kernel(
      y, x,
      {lora_a, lora_b, scaling, {dropout_p, seed, std::move(row_offset), std::move(col_offset)}});
}

using LoraUpdateBackward = std::tuple<at::Tensor, at::Tensor, at::Tensor>(
    const at::Tensor& grad, const at::Tensor& x, const Update& update, const at::Tensor& s,
    std::array<bool, 3> output_mask);
template <LoraUpdateBackward kernel>
std::tuple<at::Tensor, at::Tensor, at::Tensor> lora_update_backward(
    const at::Tensor& grad, const at::Tensor& x, const at::Tensor& lora_a, const at::Tensor& lora_b,
    const at::Tensor& s, double scaling, double dropout_p, const std::optional<at::Tensor>& seed,
    c10::SymInt row_offset, c10::SymInt col_offset, std::array<bool, 3> output_mask) {
  return kernel(
      grad, x,
      {lora_a, lora_b, scaling, {dropout_p, seed, std::move(row_offset), std::move(col_offset)}}, s,
      output_mask);
}

}  // namespace lora_ext::flat
