// What launches of one adapter and of many take from tensors: pitches, alignment, the mask, the
// workspace, the stream, and what comes of an error.
#pragma once

#include <ATen/core/Tensor.h>

#include <string>

#include "common/call.h"
#include "cuda/lora_linear.h"
#include "kernel/mask_operand.h"

namespace lora_ext::kernel_launch {

// Of one row, a tensor may have any stride; this is one of whole chunks.
int64_t pitch_of(const at::Tensor& tensor);
// A tensor's rows can be copied in 16-byte chunks, and by a tensor map, which has no place for rows
// that overlap.
bool aligned(const at::Tensor& tensor);
// Of a result [rows, columns] that torch's allocator aligns.
bool aligned_rows(int64_t columns);

kernel::Mask mask_of(const DropoutArgs& dropout);

at::Tensor workspace_for(int64_t bytes, const at::Tensor& like);

// The current stream of a CUDA device. Elsewhere, in tests, there is none.
void* stream_of(const at::Device& device);
// Without an index a CUDA device is the current one.
int index_of(const at::Device& device);
cuda::Half half_of(at::ScalarType dtype);

// Throws LaunchError, or OutOfMemoryError, unless the error is empty.
void check_launch(const std::string& error, const at::Device& device);

}  // namespace lora_ext::kernel_launch
