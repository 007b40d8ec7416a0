// Errors of the CUDA runtime as text.
#pragma once
#include <cuda_runtime_api.h>

#include <string>

namespace lora_ext::cuda {

// Returns "" for cudaSuccess; else the runtime's message, with both versions if the driver is older
// than the runtime of this build. Clears the error: otherwise the next caller to query it, torch or
// this library, would report it for its own call.
std::string text_of(cudaError_t error);

}  // namespace lora_ext::cuda
