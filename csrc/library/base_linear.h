// The frozen GEMMs: x W^T + bias and dY W, plain or on a packed weight.
#pragma once

#include "common/call.h"

namespace lora_ext {

at::Tensor base_forward(const ForwardArgs& args);    // [M, N], a fresh tensor
at::Tensor base_backward(const BackwardArgs& args);  // [M, K], a fresh tensor

}  // namespace lora_ext
