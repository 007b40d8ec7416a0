// The base's part of a result: x W^T + bias and dY W, with a plain or a packed weight; or a given
// y, which contributes nothing to the gradient of x.
#pragma once

#include "common/call.h"

namespace lora_ext {

// [M, N] of x [M, K], a fresh tensor
at::Tensor base_forward(const at::Tensor& x, const Base& base);
// [M, K] of dY [M, N], a fresh tensor of x's dtype
at::Tensor base_backward(const at::Tensor& grad, const at::Tensor& x, const Base& base);

// Adds the base product of a weight onto the low-rank part, which already includes the bias.
void add_base_forward(at::Tensor& y, const at::Tensor& x, const Base& base);
void add_base_backward(at::Tensor& dx, const at::Tensor& grad, const Base& base);

}  // namespace lora_ext
