// What torch's half of the package asks of a device. Like all of csrc/kernels/*.h (lora_linear.h,
// lora_grouped.h, dropout.h and dequantize.h), free of torch and of CUDA's headers.
//
// The device library that is linked defines these functions: csrc/kernels/launch/*.cu; none.cpp
// there in a build without CUDA; or one of those in tests/emulated/, which run the kernels in the
// execution layer. The objects of torch's half are the same with each of them.
#pragma once

#include <cstdint>
#include <optional>
#include <string>

#include "kernels/plan/plan.h"

namespace lora_ext::cuda {

// Whether this build has kernels. Called while the library is loaded, too.
bool is_built();
// Whether kernels run on a torch device: CUDA here, the CPU in an emulated implementation.
bool has_kernels(bool is_cuda);
// Only `error` is set if the device cannot be queried.
plan::Card card_of(int device);
// The newest CUDA version that the driver supports, such as "12.8", with advice if this build needs
// a newer one; "none" without a driver.
std::string driver();
// Whether a graph is being captured on the stream: then nothing may synchronise.
bool is_capturing(void* stream);
// An id that, unlike the handle, no other stream of the process has or will have; nullopt if CUDA
// does not tell. Not while a graph is being captured.
std::optional<uint64_t> stream_id(void* stream);
// Numbers that are zero for what comes next on the stream, in memory of the current device that is
// never freed and that torch's allocator does not know; nullptr if there is none. Not while a graph
// is being captured on the stream.
uint32_t* permanent_zeros(int64_t count, void* stream);
// Waits until the stream is done, for at most `seconds`. Returns "", or the error of its kernels;
// nullopt if they have not ended.
std::optional<std::string> wait(void* stream, double seconds);

}  // namespace lora_ext::cuda
