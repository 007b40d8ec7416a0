// Dequantisation on CUDA: launchers, free of torch. They do not synchronise with the host.
#pragma once

#include <string>

#include "common/dtype.h"
#include "kernel/dequantize.h"

namespace lora_ext::cuda {

using Floating = Dtype;

// Launches on `stream` of the current device and writes values of the type; count > 0. Returns ""
// or the error of the launch.
std::string launch_dequantize(Floating type, const kernel::Dequantize4bitParams& params,
                              void* stream);
std::string launch_dequantize(Floating type, const kernel::Dequantize8bitParams& params,
                              void* stream);

}  // namespace lora_ext::cuda
