// What lora_linear, lora_update and dropout_mask accept, on real and on symbolic shapes. The values
// of index, offs and ranks are not read: common/segments.h does that on the host, and kernels on a
// GPU take what does not exist for no adapter.
#pragma once

#include "op/ops.h"

namespace lora_ext {

void check_forward(const at::Tensor& x, const Base& base, const Update& update);

// With dY [..., N] and S [M, r].
void check_backward(const at::Tensor& grad, const at::Tensor& x, const Base& base,
                    const Update& update, const at::Tensor& s);

// With one wish for each tensor of lora_a and of lora_b.
Wanted checked_wanted(WantedOfBase of_base, const c10::List<bool>& wanted_a,
                      const c10::List<bool>& wanted_b, const Base& base, const Update& update);

// One of the four dtypes.
void check_supported(const char* op, const char* name, at::ScalarType dtype);

// Seed and numbers of dropout_mask.
void check_dropout_mask(const at::Tensor& seed, const c10::SymInt& rows, const c10::SymInt& cols,
                        double dropout_p, const c10::SymInt& row_offset,
                        const c10::SymInt& col_offset);

}  // namespace lora_ext
