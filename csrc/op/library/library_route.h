// The library route: the LoRA linear in ATen calls, on any device and dtype; and its dropout.
#pragma once

#include "common/call.h"

namespace lora_ext::library_route {

Forward forward(const ForwardArgs& args);
Backward backward(const BackwardArgs& args);

// Many adapters: a loop over those that have rows, which gathers the rows of each. It reads the
// index on the host, so on a GPU it waits for the device.
Forward forward_grouped(const ForwardArgs& args);
Backward backward_grouped(const BackwardArgs& args);

}  // namespace lora_ext::library_route

// Dropout outside of the kernels that draw the mask themselves.
namespace lora_ext {

// keep_scale * mask * x of rows [first_row, ...) as a new tensor; x is [rows, K].
at::Tensor dropped(const at::Tensor& x, const DropoutArgs& dropout, int64_t first_row);
// x *= keep_scale * mask in place; x must be a temporary of the caller.
void drop_(at::Tensor& x, const DropoutArgs& dropout, int64_t first_row);
// Sets to zero, in place, the elements of x [rows, K] that are not kept; the others are not scaled.
// Row m of x has the mask's row mask_rows[m] (int64, contiguous, on x's device).
void drop_rows_(at::Tensor& x, const at::Tensor& mask_rows, const DropoutArgs& dropout);
// mask [rows, cols] of bool: true where the element is kept.
void fill_dropout_mask(at::Tensor& mask, const DropoutArgs& dropout);

}  // namespace lora_ext
