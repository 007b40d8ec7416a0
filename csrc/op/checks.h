// What lora_linear and lora_update accept. Works on real and on symbolic shapes, so Meta and eager
// share it.
#pragma once

#include "common/call.h"

namespace lora_ext {

// Shapes, dtypes, devices and numbers of one call; throws with tensor, expected and got.
void check_forward(const at::Tensor& x, const Base& base, const Update& update);

// The same for a backward, with dY [..., N] and S [M, r].
void check_backward(const at::Tensor& grad, const at::Tensor& x, const Base& base,
                    const Update& update, const at::Tensor& s);

// Seed and numbers of dropout_mask.
void check_dropout_mask(const at::Tensor& seed, const c10::SymInt& rows, const c10::SymInt& cols,
                        double dropout_p, const c10::SymInt& row_offset,
                        const c10::SymInt& col_offset);

}  // namespace lora_ext
