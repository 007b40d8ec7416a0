// What the autograd Function refuses; each message names an alternative.
#pragma once

#include <vector>

#include "common/call.h"

namespace lora_ext {

void check_no_tangents(const Base& base, bool any);
void check_frozen(const Base& base);
void check_transforms(const Base& base);

// In grad mode, replaces the gradients of a call by copies whose own backward raises: there is no
// second derivative (create_graph). Undefined gradients stay undefined.
void refuse_double_backward(const std::vector<at::Tensor*>& gradients,
                            const std::vector<at::Tensor>& inputs, const char* name);

}  // namespace lora_ext
