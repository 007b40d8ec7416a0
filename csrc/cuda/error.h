// Errors of the CUDA runtime as text.
#pragma once
#include <cuda_runtime_api.h>

#include <string>

namespace lora_ext::cuda {

// "" for cudaSuccess; else the runtime's words, with both versions where the driver is older than
// the runtime of this build. The error is the caller's from here on: left behind, the next one to
// ask, torch or we, would report it for a call of its own.
std::string text_of(cudaError_t error);

}  // namespace lora_ext::cuda
