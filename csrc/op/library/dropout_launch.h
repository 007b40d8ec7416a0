// Where tensors become raw pointers: device guard, current stream, launch errors.
#pragma once

#include "common/call.h"

namespace lora_ext::cuda {

// out = keep_scale * mask * x for rows [first_row, ...); x and out may be the same tensor.
void drop(const at::Tensor& x, at::Tensor& out, const DropoutArgs& dropout, int64_t first_row);
// mask [rows, cols] of bool
void dropout_mask(at::Tensor& mask, const DropoutArgs& dropout);

}  // namespace lora_ext::cuda
