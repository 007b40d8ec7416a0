// Where the tensors of a quantised weight on CUDA become raw pointers: device guard, current
// stream, launch errors.
#pragma once

#include <ATen/core/Tensor.h>

#include "kernels/dequantize.h"

namespace lora_ext::cuda {

// Writes `out` on its device, in its dtype. The caller sets the other parameters.
void dequantize(kernel::Dequantize4bitParams params, const at::Tensor& out);
void dequantize(kernel::Dequantize8bitParams params, const at::Tensor& out);

}  // namespace lora_ext::cuda
