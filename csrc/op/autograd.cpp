// The torch autograd Function of lora_ext::lora_linear.
//
// Saved for backward: x, S [M, r], the seed (8 bytes) and references to weight, lora_a, lora_b.
// Never saved: a mask, a copy of x, of the weight or of the output. Backward asks only for the
// gradients that are needed; the weight is frozen and has none.
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

struct LoraLinearFunction : torch::autograd::Function<LoraLinearFunction> {
  // Positions of the differentiable inputs among forward's arguments: tensors apart from the values
  // that hold them, where torch finds them.
  enum Input { kX = 0, kLoraA = 1, kLoraB = 2, kBias = 3, kNumInputs = 6 };

  static at::Tensor forward(AutogradContext* ctx, const at::Tensor& x, const at::Tensor& lora_a,
                            const at::Tensor& lora_b, const std::optional<at::Tensor>& bias,
                            const Base& base, const Update& update) {
    at::AutoDispatchBelowADInplaceOrView guard;
    auto [y, s] = ops::lora_linear_forward(x, base, update);
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
    if (!grads[0].defined()) return out;
    const variable_list saved = ctx->get_saved_variables();
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
    const std::array<bool, 4> output_mask = {
        ctx->needs_input_grad(kX), ctx->needs_input_grad(kLoraA), ctx->needs_input_grad(kLoraB),
        data["has_bias"].toBool() && ctx->needs_input_grad(kBias)};
    std::tie(out[kX], out[kLoraA], out[kLoraB], out[kBias]) =
        ops::lora_linear_backward(grads[0], saved[0], base, update, saved[4], output_mask);
    return out;
  }
};

at::Tensor lora_linear_autograd(const at::Tensor& x, const Base& base, const Update& update) {
  const at::Tensor &weight = base.weight, &lora_a = update.lora_a, &lora_b = update.lora_b;
  const std::optional<at::Tensor>& bias = base.bias;
  TORCH_CHECK_NOT_IMPLEMENTED(
      !has_tangent(x) && !has_tangent(weight) && !has_tangent(lora_a) && !has_tangent(lora_b) &&
          !(bias && has_tangent(*bias)),
      "lora_ext.lora_linear: expected reverse-mode autograd, but got a forward-mode tangent; use "
      "lora_ext.reference.lora_linear_reference for forward mode");
  if (at::GradMode::is_enabled()) {
    LORA_EXT_CHECK(!weight.requires_grad(),
                   "expected a frozen weight, but got one that requires grad: no gradient is "
                   "computed for it; call weight.requires_grad_(False)");
    if (x.requires_grad() || lora_a.requires_grad() || lora_b.requires_grad() || wants_grad(bias)) {
      return LoraLinearFunction::apply(x, lora_a, lora_b, bias, base, update);
    }
  }
  at::AutoDispatchBelowADInplaceOrView guard;
  return ops::lora_linear(x, base, update);
}

// First derivatives only: under create_graph the gradients pass through this identity, whose own
// backward raises.
struct NoDoubleBackward : torch::autograd::Function<NoDoubleBackward> {
  static variable_list forward(AutogradContext* /*ctx*/, const variable_list& gradients,
                               const at::Tensor& /*grad*/, const at::Tensor& /*x*/,
                               const at::Tensor& /*lora_a*/, const at::Tensor& /*lora_b*/) {
    variable_list out;
    for (const at::Tensor& gradient : gradients) out.push_back(gradient.view_as(gradient));
    return out;
  }

  static variable_list backward(AutogradContext* /*ctx*/, const variable_list& /*grads*/) {
    TORCH_CHECK_NOT_IMPLEMENTED(
        false,
        "lora_ext.lora_linear: expected first derivatives only, but got a second backward "
        "(create_graph=True); use lora_ext.reference.lora_linear_reference for higher derivatives");
  }
};

std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor> lora_linear_backward_autograd(
    const at::Tensor& grad, const at::Tensor& x, const Base& base, const Update& update,
    const at::Tensor& s, std::array<bool, 4> output_mask) {
  std::array<at::Tensor, 4> out;
  {
    at::AutoDispatchBelowADInplaceOrView guard;
    std::tie(out[0], out[1], out[2], out[3]) =
        ops::lora_linear_backward(grad, x, base, update, s, output_mask);
  }
  const at::Tensor &lora_a = update.lora_a, &lora_b = update.lora_b;
  const bool differentiable =
      grad.requires_grad() || x.requires_grad() || lora_a.requires_grad() || lora_b.requires_grad();
  if (at::GradMode::is_enabled() && differentiable) {
    variable_list defined;
    for (const at::Tensor& tensor : out) {
      if (tensor.defined()) defined.push_back(tensor);
    }
    defined = NoDoubleBackward::apply(defined, grad, x, lora_a, lora_b);
    size_t next = 0;
    for (at::Tensor& tensor : out) {
      if (tensor.defined()) tensor = defined[next++];
    }
  }
  return {out[0], out[1], out[2], out[3]};
}

}  // namespace

TORCH_LIBRARY_IMPL(lora_ext, Autograd, m) {
  m.impl("lora_linear", TORCH_FN(flat::lora_linear<lora_linear_autograd>));
  m.impl("lora_linear_backward",
         TORCH_FN(flat::lora_linear_backward<lora_linear_backward_autograd>));
  m.impl("lora_linear_forward", torch::autograd::autogradNotImplementedFallback());
  m.impl("dropout_mask", torch::CppFunction::makeFallthrough());
}

}  // namespace lora_ext
