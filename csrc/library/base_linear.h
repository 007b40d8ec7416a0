// The base's part of a result: x W^T + bias and dY W, plain or on a packed weight; or a given y,
// from which x has no gradient.
#pragma once

#include "common/call.h"

namespace lora_ext {

at::Tensor base_forward(const ForwardArgs& args);    // [M, N], a fresh tensor
at::Tensor base_backward(const BackwardArgs& args);  // [M, K], a fresh tensor

// Of a weight, onto what the low-rank part has written; a bias is there already.
void add_base(at::Tensor& y, const ForwardArgs& args);
void add_base(at::Tensor& dx, const BackwardArgs& args);

}  // namespace lora_ext
