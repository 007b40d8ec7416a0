// What the autograd Function refuses, in words that name a way out.
#pragma once

#include <vector>

#include "common/call.h"

namespace lora_ext {

void check_no_tangents(const Base& base, bool any);
void check_frozen(const Base& base);
void check_transforms(const Base& base);

// In grad mode: makes the gradients of a call those of which there is no second derivative, whose
// own backward raises (create_graph). Undefined gradients stay so.
void refuse_double_backward(const std::vector<at::Tensor*>& gradients,
                            const std::vector<at::Tensor>& inputs, const char* name);

}  // namespace lora_ext
