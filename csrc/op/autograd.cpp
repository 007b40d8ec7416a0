// The torch autograd Function of lora_ext::lora and lora_ext::lora_grouped.
//
// Saved for backward: x, S [M, r], the seed (8 bytes) and references to weight, lora_a and lora_b;
// with many adapters also to scaling, index or offs, and ranks. Never saved: a mask, or a copy of
// x, of the weight, of y or of the output. Backward computes only the gradients that are needed;
// the weight is frozen and has none, and the gradient of a given y is that of the output. A factor
// without rows has a gradient of zeros, as with grouped_mm: which factors these are is known only
// on the device.
#include <ATen/FuncTorchTLS.h>
#include <ATen/core/grad_mode.h>
#include <torch/csrc/autograd/autograd_not_implemented_fallback.h>
#include <torch/csrc/autograd/custom_function.h>

#include <algorithm>

#include "common/check.h"
#include "op/ops.h"

namespace lora_ext {
namespace {

using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

// ---- what is refused ----

// op: the name of the Python function, whose reference is the alternative.
void refuse(const std::string& op, const char* expected, const char* for_what) {
  TORCH_CHECK_NOT_IMPLEMENTED(false, "lora_ext.", op, ": expected ", expected,
                              "; use lora_ext.reference.", op, "_reference ", for_what);
}

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
    refuse(ctx->saved_data["name"].toStringRef(),
           "first derivatives only, but got a second backward (create_graph=True)",
           "for higher derivatives");
    return {};
  }
};

// torch refuses C++ Functions inside its function transforms, but its message names no alternative.
void check_transforms(const Base& base) {
  const auto& functorch = at::functorch::functorchTLSAccessor();
  if (!functorch) return;
  try {
    functorch->checkSupportsCppAutogradFunction();
  } catch (const c10::Error&) {
    refuse(base.op(),
           "a call outside of torch.func's transforms (grad, vjp, vmap of a gradient), which "
           "cannot see into a C++ autograd Function, but got one inside",
           "there");
  }
}

bool requires_grad(const at::Tensor& tensor) { return tensor.requires_grad(); }

// In grad mode, replaces the gradients of a call by copies whose own backward raises: there is no
// second derivative (create_graph). Undefined gradients stay undefined.
void refuse_double_backward(const std::vector<at::Tensor*>& gradients, const variable_list& inputs,
                            const char* name) {
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

// ---- the Function ----

bool has_tangent(const at::Tensor& tensor) { return tensor._fw_grad(/*level=*/0).defined(); }

const at::Tensor& tensor_of(const Base& base) { return base.is_given() ? base.y : base.weight; }

template <class Holds>
bool any_input(const at::Tensor& x, const Base& base, const Update& update, const Holds& holds) {
  return holds(x) || holds(tensor_of(base)) ||
         std::any_of(update.lora_a.begin(), update.lora_a.end(), holds) ||
         std::any_of(update.lora_b.begin(), update.lora_b.end(), holds) ||
         (base.bias && holds(*base.bias));
}

// Whether a weight still has the values from which a pack was made: in the same memory, which
// `packed_of`, an alias of that weight, has kept from being given to another tensor.
bool is_still(const at::Tensor& weight, const at::Tensor& packed_of) {
  return weight.const_data_ptr() == packed_of.const_data_ptr() &&
         weight.scalar_type() == packed_of.scalar_type() && weight.sizes() == packed_of.sizes() &&
         weight.strides() == packed_of.strides();
}

struct LoraFunction : torch::autograd::Function<LoraFunction> {
  // The differentiable inputs come first: x, the frozen weight or the given y, the tensors of
  // lora_a and of lora_b, and the bias; then the other arguments. Torch finds tensors and
  // TensorLists among the arguments, but not tensors inside of other values.
  static constexpr size_t kX = 0, kBase = 1, kFactors = 2;
  // The tensors that are saved before the factors; the last four only with many adapters.
  enum Saved { kSavedX, kWeight, kPackedOf, kS, kSeed, kScaling, kIndex, kOffs, kRanks };

  static at::Tensor forward(AutogradContext* ctx, const at::Tensor& x,
                            const at::Tensor& /*base_tensor*/, at::TensorList lora_a,
                            at::TensorList lora_b, const std::optional<at::Tensor>& bias,
                            const Base& base, const Update& update) {
    at::AutoDispatchBelowADInplaceOrView guard;
    auto [y, s] = ops::lora_forward(x, base, update);
    const at::Tensor none;
    const DropoutArgs& dropout = update.dropout;
    const at::Tensor packed_of = base.packed_t ? base.weight.detach() : none;
    variable_list saved = {x, base.weight, packed_of, s, dropout.seed.value_or(none)};
    if (const std::optional<Grouping>& many = update.grouping) {
      saved.insert(saved.end(), {many->scaling, many->index.value_or(none),
                                 many->offs.value_or(none), many->ranks.value_or(none)});
    }
    saved.insert(saved.end(), lora_a.begin(), lora_a.end());
    saved.insert(saved.end(), lora_b.begin(), lora_b.end());
    ctx->save_for_backward(std::move(saved));
    auto& data = ctx->saved_data;
    data["is_one"] = update.is_one();
    data["scaling"] = update.scaling;
    data["dropout_p"] = dropout.p;
    data["row_offset"] = dropout.row_offset;
    data["col_offset"] = dropout.col_offset;
    data["cast_weight"] = base.cast_weight;
    data["has_bias"] = bias.has_value();
    data["row_block"] = base.row_block;
    if (base.packed_t) data["packed_t"] = *base.packed_t;
    return y;
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    const variable_list saved = ctx->get_saved_variables();
    auto& data = ctx->saved_data;
    const bool is_one = data["is_one"].toBool();
    const size_t begin = is_one ? kScaling : kRanks + 1, factors = (saved.size() - begin) / 2;
    const size_t bias = kFactors + 2 * factors;
    variable_list out(bias + 3);
    const at::Tensor& grad = grads[0];
    if (!grad.defined()) return out;
    Base base{saved[kWeight]};
    base.cast_weight = data["cast_weight"].toBool(), base.row_block = data["row_block"].toInt();
    if (data.count("packed_t") != 0 && is_still(base.weight, saved[kPackedOf])) {
      base.packed_t = data["packed_t"].toTensor();
    }
    const auto first = saved.begin() + static_cast<int64_t>(begin);
    const auto middle = first + static_cast<int64_t>(factors);
    Update update{{first, middle},
                  {middle, saved.end()},
                  data["scaling"].toDouble(),
                  {data["dropout_p"].toDouble(), optional(saved[kSeed]),
                   data["row_offset"].toSymInt(), data["col_offset"].toSymInt()}};
    if (!is_one) {
      update.grouping = Grouping{saved[kScaling], optional(saved[kIndex]), optional(saved[kOffs]),
                                 optional(saved[kRanks])};
    }
    if (base.is_given() && ctx->needs_input_grad(kBase)) out[kBase] = grad;
    Wanted wanted{ctx->needs_input_grad(kX), NeedsGrad(factors), NeedsGrad(factors),
                  data["has_bias"].toBool() && ctx->needs_input_grad(bias)};
    for (size_t i = 0; i < factors; ++i) {
      wanted.dlora_a[i] = ctx->needs_input_grad(kFactors + i);
      wanted.dlora_b[i] = ctx->needs_input_grad(kFactors + factors + i);
    }
    variable_list da, db;
    std::tie(out[kX], da, db, out[bias]) =
        ops::lora_backward(grad, saved[kS], wanted, saved[kSavedX], base, update);
    place(da, wanted.dlora_a, out, kFactors);
    place(db, wanted.dlora_b, out, kFactors + factors);
    return out;
  }

  // Puts the requested gradients at their positions among all inputs.
  static void place(const variable_list& gradients, const NeedsGrad& wanted, variable_list& out,
                    size_t at) {
    size_t next = 0;
    for (size_t i = 0; i < wanted.size(); ++i) {
      if (wanted[i]) out[at + i] = gradients[next++];
    }
  }
};

at::Tensor lora_autograd(const at::Tensor& x, const Base& base, const Update& update) {
  LORA_EXT_CHECK(tensor_of(base).defined(), "expected a weight or a y, but got neither");
  if (any_input(x, base, update, has_tangent)) {
    refuse(base.op(), "reverse-mode autograd, but got a forward-mode tangent", "for forward mode");
  }
  if (at::GradMode::is_enabled()) {
    LORA_EXT_CHECK(base.is_given() || !base.weight.requires_grad(),
                   "expected a frozen weight, but got one that requires grad: no gradient is "
                   "computed for it; call weight.requires_grad_(False)");
    if (any_input(x, base, update, requires_grad)) {
      check_transforms(base);
      return LoraFunction::apply(x, tensor_of(base), at::TensorList(update.lora_a),
                                 at::TensorList(update.lora_b), base.bias, base, update);
    }
  }
  at::AutoDispatchBelowADInplaceOrView guard;
  return ops::lora(x, base, update);
}

Gradients lora_backward_autograd(const at::Tensor& grad, const at::Tensor& s, const Wanted& wanted,
                                 const at::Tensor& x, const Base& base, const Update& update) {
  Gradients out;
  {
    at::AutoDispatchBelowADInplaceOrView guard;
    out = ops::lora_backward(grad, s, wanted, x, base, update);
  }
  if (!at::GradMode::is_enabled()) return out;
  auto& [dx, da, db, dbias] = out;
  std::vector<at::Tensor*> gradients = {&dx, &dbias};
  for (std::vector<at::Tensor>* list : {&da, &db}) {
    for (at::Tensor& gradient : *list) gradients.push_back(&gradient);
  }
  variable_list inputs = {grad, x};
  inputs.insert(inputs.end(), update.lora_a.begin(), update.lora_a.end());
  inputs.insert(inputs.end(), update.lora_b.begin(), update.lora_b.end());
  refuse_double_backward(gradients, inputs, base.op());
  return out;
}

}  // namespace

TORCH_LIBRARY_IMPL(lora_ext, Autograd, m) {
  register_lora<lora_autograd>(m);
  register_backward<lora_backward_autograd>(m);
  m.impl("lora_forward", torch::autograd::autogradNotImplementedFallback());
  m.impl("lora_grouped_forward", torch::autograd::autogradNotImplementedFallback());
}

}  // namespace lora_ext
