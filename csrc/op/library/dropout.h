// Dropout apart from the kernels that draw their own: masked copies for the library route, and the
// mask.
#pragma once

#include "common/call.h"

namespace lora_ext {

// keep_scale * mask * x of rows [first_row, ...) as a new tensor; x is [rows, K].
at::Tensor dropped(const at::Tensor& x, const DropoutArgs& dropout, int64_t first_row);
// x *= keep_scale * mask in place; x is a temporary of ours.
void drop_(at::Tensor& x, const DropoutArgs& dropout, int64_t first_row);
// mask [rows, cols] of bool: where the element is kept.
void fill_dropout_mask(at::Tensor& mask, const DropoutArgs& dropout);

}  // namespace lora_ext
