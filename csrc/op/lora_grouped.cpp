// The op layer of many adapters: lora_linear_grouped and lora_update_grouped, their forwards and
// backwards, for real tensors on the CPU and on CUDA. Checks, flattens to 2-D, and calls the route.
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include "op/base.h"
#include "op/flatten.h"
#include "op/grouped_checks.h"
#include "op/grouped_flat.h"
#include "route/grouped_route.h"

namespace lora_ext {
namespace {

at::Tensor empty_s(const at::Tensor& x, int64_t rows, const GroupedUpdate& update) {
  return at::zeros({rows, update.max_rank()},
                   x.options().dtype(accumulation_dtype(x.scalar_type())));
}

GroupedForward linear_forward(const at::Tensor& x, const Base& base, const GroupedUpdate& update) {
  const NoAutocast no_autocast;
  check_grouped_forward(x, base, update);
  const at::Tensor rows = flattened(x);
  const int64_t out_features = update.out_features();
  if (rows.size(0) == 0 || base.weight.numel() == 0) {
    return {bias_alone(x, base, out_features), empty_s(x, rows.size(0), update)};
  }
  GroupedForward out = route::forward({rows, base_for(base, x.scalar_type()), update});
  out.y = out.y.view(with_last(x, out_features));
  return out;
}

GroupedForward update_forward(const at::Tensor& y, const at::Tensor& x,
                              const GroupedUpdate& update) {
  const NoAutocast no_autocast;
  check_grouped_forward(x, Base::given(y), update);
  const at::Tensor rows = flattened(x);
  if (x.numel() == 0 || y.numel() == 0) {
    return {y.clone(at::MemoryFormat::Contiguous), empty_s(x, rows.size(0), update)};
  }
  GroupedForward out = route::forward({rows, Base::given(flattened(y)), update});
  out.y = out.y.view(y.sizes());
  return out;
}

// Of those factors that want one.
std::vector<at::Tensor> zeros_of(const std::vector<at::Tensor>& factors,
                                 const std::vector<bool>& wanted) {
  std::vector<at::Tensor> out;
  for (size_t i = 0; i < factors.size(); ++i) {
    if (wanted[i]) out.push_back(at::zeros(factors[i].sizes(), factors[i].options()));
  }
  return out;
}

std::vector<at::Tensor> defined_of(const std::vector<at::Tensor>& gradients) {
  std::vector<at::Tensor> out;
  for (const at::Tensor& gradient : gradients) {
    if (gradient.defined()) out.push_back(gradient);
  }
  return out;
}

bool any(const std::vector<bool>& wanted) {
  return std::find(wanted.begin(), wanted.end(), true) != wanted.end();
}

// All but the bias's.
flat::LoraUpdateGradients gradients(const at::Tensor& grad, const at::Tensor& x, const Base& base,
                                    const GroupedUpdate& update, const at::Tensor& s,
                                    const flat::GroupedWanted& wanted) {
  const bool empty =
      x.numel() == 0 || grad.numel() == 0 || (!base.is_given() && base.weight.numel() == 0);
  if (empty) {
    return {wanted.dx ? at::zeros(x.sizes(), x.options()) : at::Tensor(),
            zeros_of(update.lora_a, wanted.dlora_a), zeros_of(update.lora_b, wanted.dlora_b)};
  }
  if (!wanted.dx && !any(wanted.dlora_a) && !any(wanted.dlora_b)) return {};
  GroupedBackward out =
      route::backward({flattened(grad), flattened(x), base, update, s.contiguous(), wanted.dx,
                       wanted.dlora_a, wanted.dlora_b});
  if (wanted.dx) out.dx = out.dx.view(x.sizes());
  return {out.dx, defined_of(out.dlora_a), defined_of(out.dlora_b)};
}

at::Tensor lora_linear_grouped(const at::Tensor& x, const Base& base, const GroupedUpdate& update) {
  return linear_forward(x, base, update).y;
}

std::tuple<at::Tensor, at::Tensor> lora_linear_grouped_forward(const at::Tensor& x,
                                                               const Base& base,
                                                               const GroupedUpdate& update) {
  const GroupedForward out = linear_forward(x, base, update);
  return {out.y, out.s};
}

flat::GroupedGradients lora_linear_grouped_backward(const at::Tensor& grad, const at::Tensor& x,
                                                    const Base& base, const GroupedUpdate& update,
                                                    const at::Tensor& s,
                                                    const flat::GroupedWanted& wanted) {
  const NoAutocast no_autocast;
  check_grouped_backward(grad, x, base, update, s, wanted.dlora_a.size(), wanted.dlora_b.size());
  const at::ScalarType dtype = x.scalar_type();
  auto [dx, da, db] = gradients(grad.to(dtype), x, base_for(base, dtype), update, s, wanted);
  at::Tensor dbias;
  if (wanted.dbias) {
    dbias = sum_of_rows(grad, base.weight.size(0), accumulation_dtype(dtype));
  }
  return {dx, da, db, dbias};
}

at::Tensor lora_update_grouped(const at::Tensor& y, const at::Tensor& x,
                               const GroupedUpdate& update) {
  return update_forward(y, x, update).y;
}

std::tuple<at::Tensor, at::Tensor> lora_update_grouped_forward(const at::Tensor& y,
                                                               const at::Tensor& x,
                                                               const GroupedUpdate& update) {
  const GroupedForward out = update_forward(y, x, update);
  return {out.y, out.s};
}

flat::LoraUpdateGradients lora_update_grouped_backward(const at::Tensor& grad, const at::Tensor& x,
                                                       const GroupedUpdate& update,
                                                       const at::Tensor& s,
                                                       const flat::GroupedWanted& wanted) {
  const NoAutocast no_autocast;
  check_grouped_backward(grad, x, Base::given(), update, s, wanted.dlora_a.size(),
                         wanted.dlora_b.size());
  return gradients(grad, x, Base::given(), update, s, wanted);
}

void register_grouped(torch::Library& m) {
  m.impl("lora_linear_grouped", TORCH_FN(flat::lora_linear_grouped<lora_linear_grouped>));
  m.impl("lora_linear_grouped_forward",
         TORCH_FN(flat::lora_linear_grouped_forward<lora_linear_grouped_forward>));
  m.impl("lora_linear_grouped_backward",
         TORCH_FN(flat::lora_linear_grouped_backward<lora_linear_grouped_backward>));
  m.impl("lora_update_grouped", TORCH_FN(flat::lora_update_grouped<lora_update_grouped>));
  m.impl("lora_update_grouped_forward",
         TORCH_FN(flat::lora_update_grouped_forward<lora_update_grouped_forward>));
  m.impl("lora_update_grouped_backward",
         TORCH_FN(flat::lora_update_grouped_backward<lora_update_grouped_backward>));
}

}  // namespace

TORCH_LIBRARY_IMPL(lora_ext, CPU, m) { register_grouped(m); }
// A packed weight is an mkldnn tensor, whose key goes before the CPU's.
TORCH_LIBRARY_IMPL(lora_ext, MkldnnCPU, m) { register_grouped(m); }
TORCH_LIBRARY_IMPL(lora_ext, CUDA, m) { register_grouped(m); }

}  // namespace lora_ext
