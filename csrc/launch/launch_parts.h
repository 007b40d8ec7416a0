// What launches of one adapter and of many take from tensors: pitches, alignment, the mask, the
// workspace, the stream, and what comes of an error.
#pragma once

#include <ATen/core/Tensor.h>

#include <string>

#include "common/call.h"
#include "cuda/lora_linear.h"
#include "kernel/mask.h"

namespace lora_ext::kernel_launch {

// Of one row, a tensor may have any stride; this is one of whole chunks.
inline int64_t pitch_of(const at::Tensor& tensor) {
  return tensor.size(0) == 1 ? (tensor.size(1) + 7) / 8 * 8 : tensor.stride(0);
}

// A tensor's rows can be copied in 16-byte chunks, and by a tensor map, which has no place for rows
// that overlap.
inline bool aligned(const at::Tensor& tensor) {
  const auto bytes = static_cast<int64_t>(tensor.element_size());
  const int64_t pitch = pitch_of(tensor);
  return tensor.stride(-1) == 1 && pitch * bytes % 16 == 0 && pitch >= tensor.size(1) &&
         reinterpret_cast<uintptr_t>(tensor.const_data_ptr()) % 16 == 0;
}

// Of a result [rows, columns] that torch's allocator aligns.
inline bool aligned_rows(int64_t columns) { return columns % 8 == 0; }

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
