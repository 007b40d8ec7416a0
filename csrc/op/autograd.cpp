// The torch autograd Function of lora_ext::lora_linear and lora_ext::lora_update.
//
// Saved for backward: x, S [M, r], the seed (8 bytes) and references to weight, lora_a, lora_b.
// Never saved: a mask, a copy of x, of the weight, of y or of the output. Backward asks only for
// the gradients that are needed; the weight is frozen and has none, and a given y has that of the
// output.
#include <ATen/core/grad_mode.h>
#include <torch/csrc/autograd/autograd_not_implemented_fallback.h>
#include <torch/library.h>

#include "op/autograd_parts.h"
#include "op/flat.h"
#include "op/ops.h"

namespace lora_ext {
namespace {

// lora_linear, or lora_update where the base is given.
struct LoraFunction : torch::autograd::Function<LoraFunction> {
  // Positions of the differentiable inputs among forward's arguments: tensors apart from the values
  // that hold them, where torch finds them.
  enum Input { kX = 0, kBase = 1, kLoraA = 2, kLoraB = 3, kBias = 4, kNumInputs = 8 };

  // base_tensor: the frozen weight, or the given y.
  static at::Tensor forward(AutogradContext* ctx, const at::Tensor& x,
                            const at::Tensor& /*base_tensor*/, const at::Tensor& lora_a,
                            const at::Tensor& lora_b, const std::optional<at::Tensor>& bias,
                            const Base& base, const Update& update, int64_t row_block) {
    at::AutoDispatchBelowADInplaceOrView guard;
    auto [y, s] = base.is_given() ? ops::lora_update_forward(base.y, x, update)
                                  : ops::lora_linear_forward(x, base, update, row_block);
    const DropoutArgs& dropout = update.dropout;
    ctx->save_for_backward(
        {x, base.weight, lora_a, lora_b, s, dropout.seed.value_or(at::Tensor())});
    ctx->saved_data["scaling"] = update.scaling;
    ctx->saved_data["dropout_p"] = dropout.p;
    ctx->saved_data["row_offset"] = dropout.row_offset;
    ctx->saved_data["col_offset"] = dropout.col_offset;
    ctx->saved_data["cast_weight"] = base.cast_weight;
    ctx->saved_data["has_bias"] = bias.has_value();
    ctx->saved_data["row_block"] = row_block;
    save_pack(ctx, base);
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
    load_pack(ctx, base);
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
    std::tie(out[kX], out[kLoraA], out[kLoraB], out[kBias]) =
        ops::lora_linear_backward(grad, x, base, update, s, {need_dx, need_da, need_db, need_dbias},
                                  data["row_block"].toInt());
    return out;
  }
};

at::Tensor call_of(const at::Tensor& x, const Base& base, const Update& update, int64_t row_block) {
  return base.is_given() ? ops::lora_update(base.y, x, update)
                         : ops::lora_linear(x, base, update, row_block);
}

at::Tensor autograd(const at::Tensor& x, const Base& base, const Update& update,
                    int64_t row_block) {
  const at::Tensor& base_tensor = base.is_given() ? base.y : base.weight;
  const at::Tensor &lora_a = update.lora_a, &lora_b = update.lora_b;
  const std::optional<at::Tensor>& bias = base.bias;
  check_no_tangents(base, has_tangent(x) || has_tangent(base_tensor) || has_tangent(lora_a) ||
                              has_tangent(lora_b) || (bias && has_tangent(*bias)));
  if (at::GradMode::is_enabled()) {
    check_frozen(base);
    if (x.requires_grad() || base_tensor.requires_grad() || lora_a.requires_grad() ||
        lora_b.requires_grad() || wants_grad(bias)) {
      check_transforms(base);
      return LoraFunction::apply(x, base_tensor, lora_a, lora_b, bias, base, update, row_block);
    }
  }
  at::AutoDispatchBelowADInplaceOrView guard;
  return call_of(x, base, update, row_block);
}

at::Tensor lora_update_autograd(const at::Tensor& y, const at::Tensor& x, const Update& update) {
  return autograd(x, Base::given(y), update, 0);
}

std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor> lora_linear_backward_autograd(
    const at::Tensor& grad, const at::Tensor& x, const Base& base, const Update& update,
    const at::Tensor& s, std::array<bool, 4> output_mask, int64_t row_block) {
  std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor> out;
  {
    at::AutoDispatchBelowADInplaceOrView guard;
    out = ops::lora_linear_backward(grad, x, base, update, s, output_mask, row_block);
  }
  if (at::GradMode::is_enabled()) {
    auto& [dx, da, db, dbias] = out;
    refuse_double_backward({&dx, &da, &db, &dbias}, {grad, x, update.lora_a, update.lora_b},
                           "lora_linear");
  }
  return out;
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> lora_update_backward_autograd(
    const at::Tensor& grad, const at::Tensor& x, const Update& update, const at::Tensor& s,
    std::array<bool, 3> output_mask) {
  std::tuple<at::Tensor, at::Tensor, at::Tensor> out;
  {
    at::AutoDispatchBelowADInplaceOrView guard;
    out = ops::lora_update_backward(grad, x, update, s, output_mask);
  }
  if (at::GradMode::is_enabled()) {
    auto& [dx, da, db] = out;
    refuse_double_backward({&dx, &da, &db}, {grad, x, update.lora_a, update.lora_b}, "lora_update");
  }
  return out;
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
