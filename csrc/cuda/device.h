// What torch's half of the package asks of a device, free of torch and of CUDA's headers, as all of
// csrc/cuda/*.h that it includes: lora_linear.h, lora_grouped.h, dropout.h and dequantize.h.
//
// Which device library is linked decides: csrc/cuda/*.cu; none.cpp in a build without CUDA; or one
// of those in tests/emulated/, which run the kernels in the execution layer. Torch's half is the
// same objects with each of them.
#pragma once

#include <cstdint>
#include <optional>
#include <string>

#include "plan/plan.h"

namespace lora_ext::cuda {

// Whether this build has kernels. Asked while the library is loaded, too.
bool is_built();
// Whether kernels run on a device of torch's: CUDA's here, the CPU in an emulated implementation.
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

}  // namespace lora_ext::cuda
