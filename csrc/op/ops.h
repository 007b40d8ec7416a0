// The ops of the torch library `lora_ext` as calls through the dispatcher: each calls the op of its
// name on whatever backend the tensors have.
#pragma once

#include <array>
#include <tuple>

#include "common/call.h"

namespace lora_ext::ops {

// row_block: in blocks of so many rows, whatever the number of all, for y and dx; 0: in one.
at::Tensor lora_linear(const at::Tensor& x, const Base& base, const Update& update,
                       int64_t row_block);

// (y [..., N], s [M, r])
std::tuple<at::Tensor, at::Tensor> lora_linear_forward(const at::Tensor& x, const Base& base,
                                                       const Update& update, int64_t row_block);

// Gradients of x, lora_a, lora_b and bias, those that the mask names.
std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor> lora_linear_backward(
    const at::Tensor& grad, const at::Tensor& x, const Base& base, const Update& update,
    const at::Tensor& s, std::array<bool, 4> output_mask, int64_t row_block);

at::Tensor lora_update(const at::Tensor& y, const at::Tensor& x, const Update& update);

// (y + the update [..., N], s [M, r])
std::tuple<at::Tensor, at::Tensor> lora_update_forward(const at::Tensor& y, const at::Tensor& x,
                                                       const Update& update);

// Gradients of x, lora_a and lora_b, those that the mask names; that of y is grad.
std::tuple<at::Tensor, at::Tensor, at::Tensor> lora_update_backward(
    const at::Tensor& grad, const at::Tensor& x, const Update& update, const at::Tensor& s,
    std::array<bool, 3> output_mask);

}  // namespace lora_ext::ops
