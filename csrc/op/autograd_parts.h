// What the autograd Functions of one adapter and of many have in common.
#pragma once

#include <torch/csrc/autograd/custom_function.h>

#include <string>
#include <vector>

#include "common/call.h"

namespace lora_ext {

using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

inline bool wants_grad(const std::optional<at::Tensor>& tensor) {
  return tensor && tensor->requires_grad();
}

inline bool has_tangent(const at::Tensor& tensor) { return tensor._fw_grad(/*level=*/0).defined(); }

inline std::optional<at::Tensor> optional(const at::Tensor& tensor) {
  return tensor.defined() ? std::optional<at::Tensor>(tensor) : std::nullopt;
}

// The pack of a base's transpose, for its backward; loaded only if it still is of this weight.
void save_pack(AutogradContext* ctx, const Base& base);
void load_pack(AutogradContext* ctx, Base& base);

// Each throws, in words that name a way out.
void check_no_tangents(const Base& base, bool any);
void check_frozen(const Base& base);
void check_transforms(const Base& base);

// In grad mode: makes the gradients of a call those of which there is no second derivative, whose
// own backward raises (create_graph). Undefined gradients stay so.
void refuse_double_backward(const std::vector<at::Tensor*>& gradients, const variable_list& inputs,
                            const char* name);

}  // namespace lora_ext
