// The op layer: lora_ext::lora_linear, lora_linear_forward and lora_linear_backward for real
// tensors on the CPU and on CUDA. Checks, flattens to 2-D, and calls the route of the device.
#include <ATen/Functions.h>
#include <torch/library.h>

#include "common/row_blocks.h"
#include "op/checks.h"
#include "op/flat.h"
#include "op/flatten.h"
#include "route/route.h"

namespace lora_ext {
namespace {

// The base as the routes take it. A pack is in the weight's own dtype: no use where that is cast.
// Under autocast the bias is rounded as the weight is; else it may be wider than x.
Base base_for(const Base& base, at::ScalarType dtype) {
  Base own = base;
  own.weight = base.weight.to(dtype);
  if (base.weight.scalar_type() != dtype) own.packed = own.packed_t = std::nullopt;
  if (base.bias && (base.cast_weight || base.bias->scalar_type() != at::kFloat)) {
    own.bias = base.bias->to(dtype);
  }
  return own;
}

Forward checked_forward(const at::Tensor& x, const Base& base, const Update& update, bool need_s) {
  const NoAutocast no_autocast;
  check_forward(x, base, update);
  const at::ScalarType dtype = x.scalar_type();
  const int64_t out_features = update.out_features();
  const ForwardArgs args{flattened(x), base_for(base, dtype), update, need_s};
  if (args.x.size(0) == 0 || base.weight.numel() == 0) {
    const at::Tensor bias_row =
        base.bias ? base.bias->to(dtype) : at::zeros({out_features}, x.options());
    at::Tensor y = at::empty(with_last(x, out_features), x.options());
    if (y.numel() != 0) y.copy_(bias_row.expand_as(y));
    return {y, at::zeros({args.x.size(0), update.rank()},
                         x.options().dtype(accumulation_dtype(dtype)))};
  }
  Forward out = route::forward(args);
  out.y = out.y.view(with_last(x, out_features));
  return out;
}

// The gradient of a bias, [columns]. On the CPU at::sum makes a wide copy of what it sums.
at::Tensor sum_of_rows(const at::Tensor& grad, int64_t columns, at::ScalarType wide) {
  at::Tensor sum = at::zeros({columns}, grad.options().dtype(wide));
  if (grad.numel() == 0) return sum;
  const at::Tensor rows = flattened(grad);
  if (!rows.is_cpu() || rows.scalar_type() == wide) return at::sum(rows, {0}, false, wide);
  for_row_blocks(rows, columns, wide, [&](int64_t row, int64_t count) {
    sum.add_(at::sum(rows.narrow(0, row, count), {0}, false, wide));
  });
  return sum;
}

at::Tensor lora_linear(const at::Tensor& x, const Base& base, const Update& update) {
  return checked_forward(x, base, update, false).y;
}

std::tuple<at::Tensor, at::Tensor> lora_linear_forward(const at::Tensor& x, const Base& base,
                                                       const Update& update) {
  const Forward out = checked_forward(x, base, update, true);
  return {out.y, out.s};
}

std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor> lora_linear_backward(
    const at::Tensor& grad, const at::Tensor& x, const Base& base, const Update& update,
    const at::Tensor& s, std::array<bool, 4> output_mask) {
  const NoAutocast no_autocast;
  check_backward(grad, x, base, update, s);
  const at::ScalarType dtype = x.scalar_type();
  Backward out;
  if (x.numel() == 0 || base.weight.numel() == 0) {
    out = zero_gradients(x, update, output_mask[0], output_mask[1], output_mask[2]);
  } else if (output_mask[0] || output_mask[1] || output_mask[2]) {
    out = route::backward({flattened(grad.to(dtype)), flattened(x), base_for(base, dtype), update,
                           s.contiguous(), output_mask[0], output_mask[1], output_mask[2]});
    if (output_mask[0]) out.dx = out.dx.view(x.sizes());
  }
  at::Tensor dbias;
  if (output_mask[3]) {
    dbias = sum_of_rows(grad, base.weight.size(0), accumulation_dtype(dtype));
  }
  return {out.dx, out.dlora_a, out.dlora_b, dbias};
}

void register_lora_linear(torch::Library& m) {
  m.impl("lora_linear", TORCH_FN(flat::lora_linear<lora_linear>));
  m.impl("lora_linear_forward", TORCH_FN(flat::lora_linear_forward<lora_linear_forward>));
  m.impl("lora_linear_backward", TORCH_FN(flat::lora_linear_backward<lora_linear_backward>));
}

}  // namespace

TORCH_LIBRARY_IMPL(lora_ext, CPU, m) { register_lora_linear(m); }
// A packed weight is an mkldnn tensor, whose key goes before the CPU's.
TORCH_LIBRARY_IMPL(lora_ext, MkldnnCPU, m) { register_lora_linear(m); }
TORCH_LIBRARY_IMPL(lora_ext, CUDA, m) { register_lora_linear(m); }

}  // namespace lora_ext
