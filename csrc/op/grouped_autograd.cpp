// The torch autograd Function of lora_ext::lora_linear_grouped and lora_ext::lora_update_grouped.
//
// Saved for backward: x, S [M, max rank], the seed, the index or offs, and references to weight,
// scaling and factors. A factor without rows has a gradient of zeros, as with grouped_mm: which
// ones those are, only the device knows.
#include <ATen/core/grad_mode.h>
#include <torch/csrc/autograd/autograd_not_implemented_fallback.h>
#include <torch/library.h>

#include <algorithm>

#include "op/autograd_parts.h"
#include "op/grouped_ops.h"

namespace lora_ext {
namespace {

bool any_requires_grad(const variable_list& tensors) {
  return std::any_of(tensors.begin(), tensors.end(),
                     [](const at::Tensor& tensor) { return tensor.requires_grad(); });
}

bool any_tangent(const variable_list& tensors) {
  return std::any_of(tensors.begin(), tensors.end(), has_tangent);
}

struct LoraGroupedFunction : torch::autograd::Function<LoraGroupedFunction> {
  // Differentiable inputs: x, the frozen weight or the given y, the tensors of lora_a and of
  // lora_b, and the bias; then what is none. Of argument lists torch sees a TensorList, not a
  // vector.
  static constexpr size_t kX = 0, kBase = 1, kFactors = 2;
  // What is saved, before the factors.
  enum Saved { kSavedX, kWeight, kS, kSeed, kScaling, kIndex, kOffs, kRanks, kSavedFactors };

  static at::Tensor forward(AutogradContext* ctx, const at::Tensor& x,
                            const at::Tensor& /*base_tensor*/, at::TensorList lora_a,
                            at::TensorList lora_b, const std::optional<at::Tensor>& bias,
                            const Base& base, const GroupedUpdate& update) {
    at::AutoDispatchBelowADInplaceOrView guard;
    auto [y, s] = base.is_given() ? ops::lora_update_grouped_forward(base.y, x, update)
                                  : ops::lora_linear_grouped_forward(x, base, update);
    const at::Tensor none;
    const DropoutArgs& dropout = update.dropout;
    variable_list saved = {x,
                           base.weight,
                           s,
                           dropout.seed.value_or(none),
                           update.scaling,
                           update.index.value_or(none),
                           update.offs.value_or(none),
                           update.ranks.value_or(none)};
    saved.insert(saved.end(), lora_a.begin(), lora_a.end());
    saved.insert(saved.end(), lora_b.begin(), lora_b.end());
    ctx->save_for_backward(std::move(saved));
    ctx->saved_data["dropout_p"] = dropout.p;
    ctx->saved_data["row_offset"] = dropout.row_offset;
    ctx->saved_data["col_offset"] = dropout.col_offset;
    ctx->saved_data["cast_weight"] = base.cast_weight;
    ctx->saved_data["has_bias"] = bias.has_value();
    save_pack(ctx, base);
    return y;
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    const variable_list saved = ctx->get_saved_variables();
    auto& data = ctx->saved_data;
    const size_t factors = (saved.size() - kSavedFactors) / 2;
    const size_t bias = kFactors + 2 * factors;
    variable_list out(bias + 3);
    const at::Tensor& grad = grads[0];
    if (!grad.defined()) return out;
    Base base{saved[kWeight]};
    base.cast_weight = data["cast_weight"].toBool();
    load_pack(ctx, base);
    const auto first = saved.begin() + kSavedFactors;
    const GroupedUpdate update{{first, first + factors},
                               {first + factors, saved.end()},
                               saved[kScaling],
                               optional(saved[kIndex]),
                               optional(saved[kOffs]),
                               optional(saved[kRanks]),
                               {data["dropout_p"].toDouble(), optional(saved[kSeed]),
                                data["row_offset"].toSymInt(), data["col_offset"].toSymInt()}};
    flat::GroupedWanted wanted{ctx->needs_input_grad(kX),
                               data["has_bias"].toBool() && ctx->needs_input_grad(bias),
                               std::vector<bool>(factors), std::vector<bool>(factors)};
    for (size_t i = 0; i < factors; ++i) {
      wanted.dlora_a[i] = ctx->needs_input_grad(kFactors + i);
      wanted.dlora_b[i] = ctx->needs_input_grad(kFactors + factors + i);
    }
    variable_list da, db;
    if (base.is_given()) {
      if (ctx->needs_input_grad(kBase)) out[kBase] = grad;
      std::tie(out[kX], da, db) =
          ops::lora_update_grouped_backward(grad, saved[kSavedX], update, saved[kS], wanted);
    } else {
      std::tie(out[kX], da, db, out[bias]) =
          ops::lora_linear_grouped_backward(grad, saved[kSavedX], base, update, saved[kS], wanted);
    }
    place(da, wanted.dlora_a, out, kFactors);
    place(db, wanted.dlora_b, out, kFactors + factors);
    return out;
  }

  // The gradients that were wanted, at their places among all.
  static void place(const variable_list& gradients, const std::vector<bool>& wanted,
                    variable_list& out, size_t at) {
    size_t next = 0;
    for (size_t i = 0; i < wanted.size(); ++i) {
      if (wanted[i]) out[at + i] = gradients[next++];
    }
  }
};

at::Tensor autograd(const at::Tensor& x, const Base& base, const GroupedUpdate& update) {
  const at::Tensor& base_tensor = base.is_given() ? base.y : base.weight;
  const std::optional<at::Tensor>& bias = base.bias;
  check_no_tangents(base, has_tangent(x) || has_tangent(base_tensor) ||
                              any_tangent(update.lora_a) || any_tangent(update.lora_b) ||
                              (bias && has_tangent(*bias)));
  if (at::GradMode::is_enabled()) {
    check_frozen(base);
    if (x.requires_grad() || base_tensor.requires_grad() || any_requires_grad(update.lora_a) ||
        any_requires_grad(update.lora_b) || wants_grad(bias)) {
      check_transforms(base);
      return LoraGroupedFunction::apply(x, base_tensor, at::TensorList(update.lora_a),
                                        at::TensorList(update.lora_b), bias, base, update);
    }
  }
  at::AutoDispatchBelowADInplaceOrView guard;
  return base.is_given() ? ops::lora_update_grouped(base.y, x, update)
                         : ops::lora_linear_grouped(x, base, update);
}

at::Tensor lora_update_grouped_autograd(const at::Tensor& y, const at::Tensor& x,
                                        const GroupedUpdate& update) {
  return autograd(x, Base::given(y), update);
}

void refuse(at::Tensor* dx, std::vector<at::Tensor>& da, std::vector<at::Tensor>& db,
            at::Tensor* dbias, const at::Tensor& grad, const at::Tensor& x,
            const GroupedUpdate& update, const char* name) {
  if (!at::GradMode::is_enabled()) return;
  std::vector<at::Tensor*> gradients = {dx};
  for (at::Tensor& gradient : da) gradients.push_back(&gradient);
  for (at::Tensor& gradient : db) gradients.push_back(&gradient);
  if (dbias != nullptr) gradients.push_back(dbias);
  variable_list inputs = {grad, x};
  inputs.insert(inputs.end(), update.lora_a.begin(), update.lora_a.end());
  inputs.insert(inputs.end(), update.lora_b.begin(), update.lora_b.end());
  refuse_double_backward(gradients, inputs, name);
}

flat::GroupedGradients lora_linear_grouped_backward_autograd(const at::Tensor& grad,
                                                             const at::Tensor& x, const Base& base,
                                                             const GroupedUpdate& update,
                                                             const at::Tensor& s,
                                                             const flat::GroupedWanted& wanted) {
  flat::GroupedGradients out;
  {
    at::AutoDispatchBelowADInplaceOrView guard;
    out = ops::lora_linear_grouped_backward(grad, x, base, update, s, wanted);
  }
  auto& [dx, da, db, dbias] = out;
  refuse(&dx, da, db, &dbias, grad, x, update, "lora_linear");
  return out;
}

flat::LoraUpdateGradients lora_update_grouped_backward_autograd(const at::Tensor& grad,
                                                                const at::Tensor& x,
                                                                const GroupedUpdate& update,
                                                                const at::Tensor& s,
                                                                const flat::GroupedWanted& wanted) {
  flat::LoraUpdateGradients out;
  {
    at::AutoDispatchBelowADInplaceOrView guard;
    out = ops::lora_update_grouped_backward(grad, x, update, s, wanted);
  }
  auto& [dx, da, db] = out;
  refuse(&dx, da, db, nullptr, grad, x, update, "lora_update");
  return out;
}

}  // namespace

TORCH_LIBRARY_IMPL(lora_ext, Autograd, m) {
  m.impl("lora_linear_grouped", TORCH_FN(flat::lora_linear_grouped<autograd>));
  m.impl("lora_linear_grouped_backward",
         TORCH_FN(flat::lora_linear_grouped_backward<lora_linear_grouped_backward_autograd>));
  m.impl("lora_linear_grouped_forward", torch::autograd::autogradNotImplementedFallback());
  m.impl("lora_update_grouped", TORCH_FN(flat::lora_update_grouped<lora_update_grouped_autograd>));
  m.impl("lora_update_grouped_backward",
         TORCH_FN(flat::lora_update_grouped_backward<lora_update_grouped_backward_autograd>));
  m.impl("lora_update_grouped_forward", torch::autograd::autogradNotImplementedFallback());
}

}  // namespace lora_ext
