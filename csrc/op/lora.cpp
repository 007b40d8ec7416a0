// The op layer: lora_ext::lora, lora_grouped, their forwards and backwards for real tensors on
// the CPU and on CUDA. Checks, flattens to 2-D, and calls the route of the device.
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include "op/base.h"
#include "op/checks.h"
#include "op/flatten.h"
#include "op/ops.h"
#include "op/route/route.h"

namespace lora_ext {
namespace {

Forward checked_forward(const at::Tensor& x, const Base& base, const Update& update, bool need_s) {
  const NoAutocast no_autocast;
  check_forward(x, base, update);
  const at::Tensor rows = flattened(x);
  const int64_t out_features = update.out_features();
  if (rows.numel() == 0 || out_features == 0) {
    const auto sums = x.options().dtype(accumulation_dtype(x.scalar_type()));
    return {base.is_given() ? base.y.clone(at::MemoryFormat::Contiguous)
                            : bias_alone(x, base, out_features),
            at::zeros({rows.size(0), update.rank()}, sums)};
  }
  Forward out = route::forward({rows, flat_base(base, x.scalar_type()), update, need_s});
  if (x.dim() != 2) out.y = out.y.view(with_last(x, out_features));
  return out;
}

at::Tensor lora(const at::Tensor& x, const Base& base, const Update& update) {
  return checked_forward(x, base, update, false).y;
}

std::tuple<at::Tensor, at::Tensor> lora_forward(const at::Tensor& x, const Base& base,
                                                const Update& update) {
  Forward out = checked_forward(x, base, update, true);
  return {std::move(out.y), std::move(out.s)};
}

// One gradient for each factor whose gradient is requested.
std::vector<at::Tensor> zeros_of(at::TensorList factors, const Wishes& wanted) {
  std::vector<at::Tensor> out;
  for (size_t i = 0; i < factors.size(); ++i) {
    if (wanted[i]) out.push_back(at::zeros(factors[i].sizes(), factors[i].options()));
  }
  return out;
}

std::vector<at::Tensor> defined_of(at::TensorList gradients) {
  std::vector<at::Tensor> out;
  for (const at::Tensor& gradient : gradients) {
    if (gradient.defined()) out.push_back(gradient);
  }
  return out;
}

Gradients lora_backward(const at::Tensor& grad, const at::Tensor& s, const Wanted& wanted,
                        const at::Tensor& x, const Base& base, const Update& update) {
  const NoAutocast no_autocast;
  check_backward(grad, s, wanted, x, base, update);
  const at::ScalarType dtype = x.scalar_type();
  at::Tensor dbias;
  if (wanted.dbias) dbias = sum_of_rows(grad, base.weight.size(0), accumulation_dtype(dtype));
  if (x.numel() == 0 || grad.numel() == 0) {
    return {wanted.dx ? at::zeros(x.sizes(), x.options()) : at::Tensor(),
            zeros_of(update.lora_a, wanted.dlora_a), zeros_of(update.lora_b, wanted.dlora_b),
            dbias};
  }
  if (!wanted.any()) return {{}, {}, {}, dbias};
  Backward out = route::backward({flattened(base.is_given() ? grad : grad.to(dtype)), flattened(x),
                                  flat_base(base, dtype), update, s.contiguous(), wanted});
  if (wanted.dx && x.dim() != 2) out.dx = out.dx.view(x.sizes());
  return {wanted.dx ? out.dx : at::Tensor(), defined_of(out.dlora_a), defined_of(out.dlora_b),
          dbias};
}

void register_lora(torch::Library& m) {
  m.impl("lora", TORCH_FN(Lora::flat<lora>));
  m.impl("lora_grouped", TORCH_FN(LoraGrouped::flat<lora>));
  m.impl("lora_forward", TORCH_FN(LoraForward::flat<lora_forward>));
  m.impl("lora_grouped_forward", TORCH_FN(LoraGroupedForward::flat<lora_forward>));
  m.impl("lora_backward", TORCH_FN(LoraBackward::flat<backward_of_one<lora_backward>>));
  m.impl("lora_grouped_backward",
         TORCH_FN(LoraGroupedBackward::flat<backward_of_many<lora_backward>>));
}

}  // namespace

TORCH_LIBRARY_IMPL(lora_ext, CPU, m) { register_lora(m); }
// A packed weight is an mkldnn tensor, whose key goes before the CPU's.
TORCH_LIBRARY_IMPL(lora_ext, MkldnnCPU, m) { register_lora(m); }
TORCH_LIBRARY_IMPL(lora_ext, CUDA, m) { register_lora(m); }

}  // namespace lora_ext
