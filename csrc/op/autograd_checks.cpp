#include "op/autograd_checks.h"

#include <ATen/FuncTorchTLS.h>
#include <torch/csrc/autograd/custom_function.h>

#include <algorithm>

#include "common/check.h"

namespace lora_ext {
namespace {

using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

// First derivatives only: under create_graph the gradients pass through this identity, whose own
// backward raises.
struct NoDoubleBackward : torch::autograd::Function<NoDoubleBackward> {
  static variable_list forward(AutogradContext* ctx, const variable_list& gradients,
                               at::TensorList /*inputs*/, const std::string& name) {
    ctx->saved_data["name"] = name;
    variable_list out;
    for (const at::Tensor& gradient : gradients) out.push_back(gradient.view_as(gradient));
    return out;
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& /*grads*/) {
    const std::string name = ctx->saved_data["name"].toStringRef();
    TORCH_CHECK_NOT_IMPLEMENTED(
        false, "lora_ext.", name,
        ": expected first derivatives only, but got a second backward (create_graph=True); use "
        "lora_ext.reference.",
        name, "_reference for higher derivatives");
  }
};

}  // namespace

void check_no_tangents(const Base& base, bool any) {
  TORCH_CHECK_NOT_IMPLEMENTED(
      !any, "lora_ext.", base.op(),
      ": expected reverse-mode autograd, but got a forward-mode tangent; use "
      "lora_ext.reference.",
      base.op(), "_reference for forward mode");
}

void check_frozen(const Base& base) {
  LORA_EXT_CHECK(base.is_given() || !base.weight.requires_grad(),
                 "expected a frozen weight, but got one that requires grad: no gradient is "
                 "computed for it; call weight.requires_grad_(False)");
}

// torch refuses C++ Functions inside its function transforms, but its message names no alternative.
void check_transforms(const Base& base) {
  const auto& functorch = at::functorch::functorchTLSAccessor();
  if (!functorch) return;
  try {
    functorch->checkSupportsCppAutogradFunction();
  } catch (const c10::Error&) {
    TORCH_CHECK_NOT_IMPLEMENTED(
        false, "lora_ext.", base.op(),
        ": expected a call outside of torch.func's transforms (grad, vjp, vmap of a "
        "gradient), which cannot see into a C++ autograd Function, but got one inside; "
        "use lora_ext.reference.",
        base.op(), "_reference there");
  }
}

void refuse_double_backward(const std::vector<at::Tensor*>& gradients, const variable_list& inputs,
                            const char* name) {
  const auto requires_grad = [](const at::Tensor& input) { return input.requires_grad(); };
  if (std::none_of(inputs.begin(), inputs.end(), requires_grad)) return;
  variable_list defined;
  for (const at::Tensor* gradient : gradients) {
    if (gradient->defined()) defined.push_back(*gradient);
  }
  defined = NoDoubleBackward::apply(defined, at::TensorList(inputs), std::string(name));
  size_t next = 0;
  for (at::Tensor* gradient : gradients) {
    if (gradient->defined()) *gradient = defined[next++];
  }
}

}  // namespace lora_ext
