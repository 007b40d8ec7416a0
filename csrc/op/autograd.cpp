// The torch autograd Function of lora_ext::lora_linear and lora_ext::lora_update.
//
// Saved for backward: x, S [M, r], the seed (8 bytes) and references to weight, lora_a, lora_b.
// Never saved: a mask, a copy of x, of the weight, of y or of the output. Backward asks only for
// the gradients that are needed; the weight is frozen and has none, and a given y has that of the
// output.
#include <ATen/FuncTorchTLS.h>
#include <ATen/core/grad_mode.h>
#include <torch/csrc/autograd/autograd_not_implemented_fallback.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>

#include "common/check.h"
#include "op/flat.h"
#include "op/ops.h"

namespace lora_ext {
namespace {

using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

bool wants_grad(const std::optional<at::Tensor>& tensor) {
  return tensor && tensor->requires_grad();
}

bool has_tangent(const at::Tensor& tensor) { return tensor._fw_grad(/*level=*/0).defined(); }

std::optional<at::Tensor> optional(const at::Tensor& tensor) {
  return tensor.defined() ? std::optional<at::Tensor>(tensor) : std::nullopt;
}

// Where a weight's values are: another place means that a pack is no longer of this weight.
int64_t address_of(const at::Tensor& weight) {
  return reinterpret_cast<int64_t>(weight.const_data_ptr());
}

// lora_linear, or lora_update where the base is given.
struct LoraFunction : torch::autograd::Function<LoraFunction> {
  // Positions of the differentiable inputs among forward's arguments: tensors apart from the values
  // that hold them, where torch finds them.
  enum Input { kX = 0, kBase = 1, kLoraA = 2, kLoraB = 3, kBias = 4, kNumInputs = 7 };

  // base_tensor: the frozen weight, or the given y.
  static at::Tensor forward(AutogradContext* ctx, const at::Tensor& x,
                            const at::Tensor& /*base_tensor*/, const at::Tensor& lora_a,
                            const at::Tensor& lora_b, const std::optional<at::Tensor>& bias,
                            const Base& base, const Update& update) {
    at::AutoDispatchBelowADInplaceOrView guard;
    auto [y, s] = base.is_given() ? ops::lora_update_forward(base.y, x, update)
                                  : ops::lora_linear_forward(x, base, update);
    const DropoutArgs& dropout = update.dropout;
    ctx->save_for_backward(
        {x, base.weight, lora_a, lora_b, s, dropout.seed.value_or(at::Tensor())});
    ctx->saved_data["scaling"] = update.scaling;
    ctx->saved_data["dropout_p"] = dropout.p;
    ctx->saved_data["row_offset"] = dropout.row_offset;
    ctx->saved_data["col_offset"] = dropout.col_offset;
    ctx->saved_data["cast_weight"] = base.cast_weight;
    ctx->saved_data["has_bias"] = bias.has_value();
    if (base.packed_t) {
      ctx->saved_data["packed_t"] = *base.packed_t;
      ctx->saved_data["packed_address"] = address_of(base.weight);
    }
    return y;
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    variable_list out(kNumInputs);
    const at::Tensor& grad = grads[0];
    if (!grad.defined()) return out;
    const variable_list saved = ctx->get_saved_variables();
    const at::Tensor &x = saved[0], &s = saved[4];
    auto& data = ctx->saved_data;
    Base base{saved[1]};
    base.cast_weight = data["cast_weight"].toBool();
    if (data.count("packed_t") != 0 && data["packed_address"].toInt() == address_of(base.weight)) {
      base.packed_t = data["packed_t"].toTensor();
    }
    const Update update{saved[2],
                        saved[3],
                        data["scaling"].toDouble(),
                        {data["dropout_p"].toDouble(), optional(saved[5]),
                         data["row_offset"].toSymInt(), data["col_offset"].toSymInt()}};
    const bool need_dx = ctx->needs_input_grad(kX), need_da = ctx->needs_input_grad(kLoraA),
               need_db = ctx->needs_input_grad(kLoraB);
    if (base.is_given()) {
      if (ctx->needs_input_grad(kBase)) out[kBase] = grad;
      std::tie(out[kX], out[kLoraA], out[kLoraB]) =
          ops::lora_update_backward(grad, x, update, s, {need_dx, need_da, need_db});
      return out;
    }
    const bool need_dbias = data["has_bias"].toBool() && ctx->needs_input_grad(kBias);
    std::tie(out[kX], out[kLoraA], out[kLoraB], out[kBias]) = ops::lora_linear_backward(
        grad, x, base, update, s, {need_dx, need_da, need_db, need_dbias});
    return out;
  }
};

at::Tensor call_of(const at::Tensor& x, const Base& base, const Update& update) {
  return base.is_given() ? ops::lora_update(base.y, x, update) : ops::lora_linear(x, base, update);
}

// torch refuses C++ Functions inside its function transforms, in words that name no way out.
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

at::Tensor autograd(const at::Tensor& x, const Base& base, const Update& update) {
  const at::Tensor& base_tensor = base.is_given() ? base.y : base.weight;
  const at::Tensor &lora_a = update.lora_a, &lora_b = update.lora_b;
  const std::optional<at::Tensor>& bias = base.bias;
  TORCH_CHECK_NOT_IMPLEMENTED(
      !has_tangent(x) && !has_tangent(base_tensor) && !has_tangent(lora_a) &&
          !has_tangent(lora_b) && !(bias && has_tangent(*bias)),
      "lora_ext.", base.op(),
      ": expected reverse-mode autograd, but got a forward-mode tangent; use "
      "lora_ext.reference.",
      base.op(), "_reference for forward mode");
  if (at::GradMode::is_enabled()) {
    LORA_EXT_CHECK(base.is_given() || !base.weight.requires_grad(),
                   "expected a frozen weight, but got one that requires grad: no gradient is "
                   "computed for it; call weight.requires_grad_(False)");
    if (x.requires_grad() || base_tensor.requires_grad() || lora_a.requires_grad() ||
        lora_b.requires_grad() || wants_grad(bias)) {
      check_transforms(base);
      return LoraFunction::apply(x, base_tensor, lora_a, lora_b, bias, base, update);
    }
  }
  at::AutoDispatchBelowADInplaceOrView guard;
  return call_of(x, base, update);
}

at::Tensor lora_update_autograd(const at::Tensor& y, const at::Tensor& x, const Update& update) {
  return autograd(x, Base::given(y), update);
}

// First derivatives only: under create_graph the gradients pass through this identity, whose own
// backward raises.
struct NoDoubleBackward : torch::autograd::Function<NoDoubleBackward> {
  static variable_list forward(AutogradContext* ctx, const variable_list& gradients,
                               const at::Tensor& /*grad*/, const at::Tensor& /*x*/,
                               const at::Tensor& /*lora_a*/, const at::Tensor& /*lora_b*/,
                               const std::string& name) {
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

// Makes the gradients of a call those of which there is no second derivative.
template <size_t kCount>
void refuse_double_backward(std::array<at::Tensor, kCount>& gradients, const at::Tensor& grad,
                            const at::Tensor& x, const Update& update, const char* name) {
  const at::Tensor &lora_a = update.lora_a, &lora_b = update.lora_b;
  const bool differentiable =
      grad.requires_grad() || x.requires_grad() || lora_a.requires_grad() || lora_b.requires_grad();
  if (!at::GradMode::is_enabled() || !differentiable) return;
  variable_list defined;
  for (const at::Tensor& gradient : gradients) {
    if (gradient.defined()) defined.push_back(gradient);
  }
  defined = NoDoubleBackward::apply(defined, grad, x, lora_a, lora_b, std::string(name));
  size_t next = 0;
  for (at::Tensor& gradient : gradients) {
    if (gradient.defined()) gradient = defined[next++];
  }
}

std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor> lora_linear_backward_autograd(
    const at::Tensor& grad, const at::Tensor& x, const Base& base, const Update& update,
    const at::Tensor& s, std::array<bool, 4> output_mask) {
  std::array<at::Tensor, 4> out;
  {
    at::AutoDispatchBelowADInplaceOrView guard;
    std::tie(out[0], out[1], out[2], out[3]) =
        ops::lora_linear_backward(grad, x, base, update, s, output_mask);
  }
  refuse_double_backward(out, grad, x, update, "lora_linear");
  return {out[0], out[1], out[2], out[3]};
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> lora_update_backward_autograd(
    const at::Tensor& grad, const at::Tensor& x, const Update& update, const at::Tensor& s,
    std::array<bool, 3> output_mask) {
  std::array<at::Tensor, 3> out;
  {
    at::AutoDispatchBelowADInplaceOrView guard;
    std::tie(out[0], out[1], out[2]) = ops::lora_update_backward(grad, x, update, s, output_mask);
  }
  refuse_double_backward(out, grad, x, update, "lora_update");
  return {out[0], out[1], out[2]};
}

}  // namespace

TORCH_LIBRARY_IMPL(lora_ext, Autograd, m) {
  m.impl("lora_linear", TORCH_FN(flat::lora_linear<autograd>));
  m.impl("lora_linear_backward",
         TORCH_FN(flat::lora_linear_backward<lora_linear_backward_autograd>));
  m.impl("lora_linear_forward", torch::autograd::autogradNotImplementedFallback());
  m.impl("lora_update", TORCH_FN(flat::lora_update<lora_update_autograd>));
  m.impl("lora_update_backward",
         TORCH_FN(flat::lora_update_backward<lora_update_backward_autograd>));
  m.impl("lora_update_forward", torch::autograd::autogradNotImplementedFallback());
  m.impl("dropout_mask", torch::CppFunction::makeFallthrough());
}

}  // namespace lora_ext
