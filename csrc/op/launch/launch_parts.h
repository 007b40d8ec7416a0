// Shared by launches of one adapter and of many: pitches, alignment, the mask, the workspace, the
// stream, and errors.
#pragma once

#include <ATen/core/Tensor.h>

#include <string>

#include "common/call.h"
#include "kernels/lora_linear.h"
#include "kernels/tile/mask_operand.h"

namespace lora_ext::kernel_launch {

// The row pitch. A tensor of one row may have any stride: the result is then a multiple of a chunk.
int64_t pitch_of(const at::Tensor& tensor);
// Whether the rows of a tensor can be copied in 16-byte chunks, and by a tensor map, which does not
// support rows that overlap.
bool aligned(const at::Tensor& tensor);
// The same for a result [rows, columns] from torch's allocator, which aligns it.
bool aligned_rows(int64_t columns);

kernel::Mask mask_of(const DropoutArgs& dropout);

at::Tensor workspace_for(int64_t bytes, const at::Tensor& like);

// The current stream of a CUDA device; nullptr for other devices, which occur in tests.
void* stream_of(const at::Device& device);
// The index of a CUDA device; if it has none, that of the current device.
int index_of(const at::Device& device);
cuda::Half half_of(at::ScalarType dtype);

// Throws LaunchError, or OutOfMemoryError, unless the error is empty.
void check_launch(const std::string& error, const at::Device& device);

}  // namespace lora_ext::kernel_launch
