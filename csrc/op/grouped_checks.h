// What lora_linear and lora_update accept with many adapters, on real and on symbolic shapes.
// The values of index, offs and ranks are not read: common/segments.h does that on the host, and
// kernels on a GPU take what does not exist for no adapter.
#pragma once

#include "common/groups.h"

namespace lora_ext {

void check_grouped_forward(const at::Tensor& x, const Base& base, const GroupedUpdate& update);

// With dY [..., N], S [M, max rank] and one wish for each tensor of lora_a and of lora_b.
void check_grouped_backward(const at::Tensor& grad, const at::Tensor& x, const Base& base,
                            const GroupedUpdate& update, const at::Tensor& s, size_t wanted_a,
                            size_t wanted_b);

}  // namespace lora_ext
