// Dequantising on CUDA: launchers, free of torch. Nothing waits for the host.
#pragma once

#include <cuda_runtime_api.h>

#include "kernel/dequantize.h"

namespace lora_ext::cuda {

enum class Floating { kFloat32, kBFloat16, kFloat16 };

// On `stream`, to values of the type; count > 0.
cudaError_t launch_dequantize(Floating type, const kernel::Dequantize4bitParams& params,
                              cudaStream_t stream);
cudaError_t launch_dequantize(Floating type, const kernel::Dequantize8bitParams& params,
                              cudaStream_t stream);

}  // namespace lora_ext::cuda
