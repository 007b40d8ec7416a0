// The kernel route on a device, free of torch: what the card is, and planned launches on a stream.
// tests/emulator/ has an implementation that runs the kernels in the execution layer.
#pragma once

#include <cstdint>
#include <optional>
#include <string>

#include "kernel/lora_linear.h"

namespace lora_ext::cuda {

enum class Half { kBFloat16, kFloat16 };

// Whether kernels run on a device of torch's: CUDA's here, the CPU in the emulated implementation.
bool has_kernels(bool is_cuda);
// With `error` alone where the device cannot be asked.
plan::Card card_of(int device);
// The newest CUDA that the driver takes, such as "12.8", with what to do where this build needs a
// newer one; "none" without a driver.
std::string driver();
// Whether a graph is being captured on the stream: then nothing may synchronise.
bool is_capturing(void* stream);
// What no other stream of the process has or will have, unlike its handle; nullopt where CUDA does
// not say. Not while a graph is being captured.
std::optional<uint64_t> stream_id(void* stream);
// Makes numbers zero, on the stream. "" or the error.
std::string clear(int32_t* numbers, int64_t count, void* stream);
// Waits until the stream is done, for some seconds at most. "", or the error in which its kernels
// ended; nullopt if they have not ended.
std::optional<std::string> wait(void* stream, double seconds);

// Asynchronous on `stream` of the current device. "" or the error of a launch.
std::string launch_forward(Half half, const plan::Plan& plan,
                           const kernel::LoraLinearForward& operands, void* stream);
std::string launch_backward(Half half, const plan::Plan& plan,
                            const kernel::LoraLinearBackward& operands, void* stream);

}  // namespace lora_ext::cuda
