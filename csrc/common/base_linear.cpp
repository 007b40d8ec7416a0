#include "common/base_linear.h"

#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/ops/linear.h>
#include <ATen/ops/mm.h>
#include <ATen/ops/zeros.h>

namespace lora_ext {
namespace {

// oneDNN's linear on a weight that pack_weight() reordered; the op that torch.compile emits.
at::Tensor packed_linear(const at::Tensor& x, const at::Tensor& packed,
                         const std::optional<at::Tensor>& bias) {
  using Attributes = c10::List<std::optional<at::Scalar>>;
  static const auto op =
      c10::Dispatcher::singleton()
          .findSchemaOrThrow("mkldnn::_linear_pointwise", "")
          .typed<at::Tensor(const at::Tensor&, const at::Tensor&, const std::optional<at::Tensor>&,
                            std::string_view, Attributes, std::optional<std::string_view>)>();
  return op.call(x, packed, bias, "none", Attributes(), std::string_view(""));
}

}  // namespace

at::Tensor base_forward(const at::Tensor& x, const Base& base) {
  if (base.is_given()) return base.y.clone(at::MemoryFormat::Contiguous);
  if (base.packed) return packed_linear(x, *base.packed, base.bias);
  return at::linear(x, base.weight, base.bias);
}

at::Tensor base_backward(const at::Tensor& grad, const at::Tensor& x, const Base& base) {
  if (base.is_given()) return at::zeros(x.sizes(), x.options());
  if (base.packed_t) return packed_linear(grad, *base.packed_t, std::nullopt);
  return at::mm(grad, base.weight);
}

void add_base_forward(at::Tensor& y, const at::Tensor& x, const Base& base) {
  y.addmm_(x, base.weight.t());
}

void add_base_backward(at::Tensor& dx, const at::Tensor& grad, const Base& base) {
  dx.addmm_(grad, base.weight);
}

}  // namespace lora_ext
