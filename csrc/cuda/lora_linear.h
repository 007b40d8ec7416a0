// The kernel route for one adapter on a device: launches a plan on a stream.
#pragma once

#include <string>

#include "common/dtype.h"
#include "kernel/lora_linear.h"

namespace lora_ext::cuda {

using Half = Dtype;  // kBFloat16 or kFloat16

// Asynchronous on `stream` of the current device. Returns "" or the error of a launch.
std::string launch_forward(Half half, const plan::Plan& plan,
                           const kernel::LoraLinearForward& operands, void* stream);
std::string launch_backward(Half half, const plan::Plan& plan,
                            const kernel::LoraLinearBackward& operands, void* stream);

}  // namespace lora_ext::cuda
