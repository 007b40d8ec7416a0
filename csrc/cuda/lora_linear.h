// The kernel route on a device, free of torch: what the card is, and planned launches on a stream.
// tests/emulator/ has an implementation that runs the kernels in the execution layer.
#pragma once

#include <string>

#include "kernel/lora_linear.h"

namespace lora_ext::cuda {

enum class Half { kBFloat16, kFloat16 };

// Whether kernels run on a device of torch's: CUDA's here, the CPU in the emulated implementation.
bool has_kernels(bool is_cuda);
plan::Card card_of(int device);
// Whether a graph is being captured on the stream: then nothing may synchronise.
bool is_capturing(void* stream);

// Asynchronous on `stream` of the current device. "" or the error of a launch.
std::string launch_forward(Half half, const plan::Plan& plan,
                           const kernel::LoraLinearForward& operands, void* stream);
std::string launch_backward(Half half, const plan::Plan& plan,
                            const kernel::LoraLinearBackward& operands, void* stream);

}  // namespace lora_ext::cuda
