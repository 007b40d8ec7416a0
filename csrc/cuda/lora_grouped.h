// The kernel route for many adapters on a device, free of torch: launches a plan on a stream, as in
// lora_linear.h.
#pragma once
#include <string>

#include "cuda/lora_linear.h"
#include "kernel/lora_grouped_linear.h"

namespace lora_ext::cuda {

// Asynchronous on `stream` of the current device. Returns "" or the error of a launch.
std::string launch_grouped_forward(Half half, const plan::Plan& plan,
                                   const kernel::LoraGroupedForward& operands, void* stream);
std::string launch_grouped_backward(Half half, const plan::Plan& plan,
                                    const kernel::LoraGroupedBackward& operands, void* stream);

}  // namespace lora_ext::cuda
