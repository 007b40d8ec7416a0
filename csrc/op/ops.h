// The ops of the torch library `lora_ext`, as C++ functions and as calls through the dispatcher.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/core/SymInt.h>

#include <array>
#include <optional>
#include <tuple>

namespace lora_ext::ops {

// Each calls the op of its name on whatever backend the tensors have.
at::Tensor lora_linear(const at::Tensor& x, const at::Tensor& weight, const at::Tensor& lora_a,
                       const at::Tensor& lora_b, const std::optional<at::Tensor>& bias,
                       double scaling, double dropout_p, const std::optional<at::Tensor>& seed,
                       c10::SymInt row_offset, c10::SymInt col_offset, bool cast_weight,
                       const std::optional<at::Tensor>& packed,
                       const std::optional<at::Tensor>& packed_t);

std::tuple<at::Tensor, at::Tensor> lora_linear_forward(
    const at::Tensor& x, const at::Tensor& weight, const at::Tensor& lora_a,
    const at::Tensor& lora_b, const std::optional<at::Tensor>& bias, double scaling,
    double dropout_p, const std::optional<at::Tensor>& seed, c10::SymInt row_offset,
    c10::SymInt col_offset, bool cast_weight, const std::optional<at::Tensor>& packed);

std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor> lora_linear_backward(
    const at::Tensor& grad, const at::Tensor& x, const at::Tensor& weight, const at::Tensor& lora_a,
    const at::Tensor& lora_b, const at::Tensor& s, double scaling, double dropout_p,
    const std::optional<at::Tensor>& seed, c10::SymInt row_offset, c10::SymInt col_offset,
    bool cast_weight, const std::optional<at::Tensor>& packed_t, std::array<bool, 4> output_mask);

}  // namespace lora_ext::ops
