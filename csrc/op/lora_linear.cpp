// The op layer: lora_ext::lora_linear, lora_linear_forward and lora_linear_backward for real
// tensors on the CPU and on CUDA. Checks, flattens to 2-D, picks the route of the device.
#include <ATen/Functions.h>
#include <torch/library.h>

#include "common/check.h"
#include "common/row_blocks.h"
#include "library/base_linear.h"
#include "library/library_route.h"
#include "op/checks.h"
#include "op/ops.h"
#include "route/cpu_route.h"

#ifdef LORA_EXT_WITH_CUDA
#include "launch/kernel_launch.h"
#include "route/kernel_route.h"
#endif

namespace lora_ext {
namespace {

// [..., C] as [M, C] with unit stride in C; a view wherever the strides allow it.
at::Tensor flattened(const at::Tensor& tensor) {
  const int64_t rows = c10::multiply_integers(tensor.sizes().slice(0, tensor.dim() - 1));
  const at::Tensor flat = tensor.reshape({rows, tensor.size(-1)});
  return flat.stride(1) == 1 ? flat : flat.contiguous();
}

std::vector<int64_t> with_last(const at::Tensor& tensor, int64_t last) {
  std::vector<int64_t> sizes = tensor.sizes().vec();
  sizes.back() = last;
  return sizes;
}

// A pack is in the weight's own dtype: no use where the weight is cast.
std::optional<at::Tensor> pack_for(const at::Tensor& weight, at::ScalarType dtype,
                                   const std::optional<at::Tensor>& packed) {
  return weight.scalar_type() == dtype ? packed : std::nullopt;
}

std::optional<at::Tensor> cast(const std::optional<at::Tensor>& tensor, at::ScalarType dtype) {
  return tensor ? std::optional<at::Tensor>(tensor->to(dtype)) : std::nullopt;
}

// The kernels add a bias in x's dtype or float32.
std::optional<at::Tensor> bias_for_kernels(const std::optional<at::Tensor>& bias,
                                           at::ScalarType dtype) {
  if (!bias) return std::nullopt;
  return (bias->scalar_type() == at::kFloat ? *bias : bias->to(dtype)).contiguous();
}

Forward run_forward(ForwardArgs args, const std::optional<at::Tensor>& bias) {
  const at::ScalarType dtype = args.x.scalar_type();
#ifdef LORA_EXT_WITH_CUDA
  if (kernel_launch::has_kernels(args.x.device())) {
    args.bias = bias_for_kernels(bias, dtype);
    if (std::optional<Forward> out = kernel_route::forward(args)) return *std::move(out);
  }
#endif
  args.bias = cast(bias, dtype);
  return args.x.is_cpu() ? cpu::forward(args) : library_route::forward(args);
}

Backward run_backward(const BackwardArgs& args) {
#ifdef LORA_EXT_WITH_CUDA
  if (kernel_launch::has_kernels(args.x.device())) {
    if (std::optional<Backward> out = kernel_route::backward(args)) return *std::move(out);
  }
#endif
  return args.x.is_cpu() ? cpu::backward(args) : library_route::backward(args);
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

// Autocast is decided once, by autocast.cpp; inside, no ATen call may cast again. A backward that
// runs inside `with torch.autocast` would otherwise round float32 adapters.
struct NoAutocast {
  c10::impl::ExcludeDispatchKeyGuard guard{c10::autocast_dispatch_keyset};
};

Forward checked_forward(const at::Tensor& x, const at::Tensor& weight, const at::Tensor& lora_a,
                        const at::Tensor& lora_b, const std::optional<at::Tensor>& bias,
                        double scaling, const DropoutArgs& dropout, bool cast_weight,
                        const std::optional<at::Tensor>& packed, bool need_s) {
  const NoAutocast no_autocast;
  check_forward(x, weight, lora_a, lora_b, bias, scaling, dropout.p, dropout.seed,
                dropout.row_offset, dropout.col_offset, cast_weight);
  const at::ScalarType dtype = x.scalar_type();
  const ForwardArgs args{flattened(x), weight.to(dtype), lora_a,  lora_b,
                         std::nullopt, scaling,          dropout, pack_for(weight, dtype, packed),
                         need_s};
  if (args.x.size(0) == 0 || weight.numel() == 0) {
    const at::Tensor bias_row = bias ? bias->to(dtype) : at::zeros({weight.size(0)}, x.options());
    at::Tensor y = at::empty(with_last(x, weight.size(0)), x.options());
    if (y.numel() != 0) y.copy_(bias_row.expand_as(y));
    return {y, at::zeros({args.x.size(0), lora_a.size(0)},
                         x.options().dtype(accumulation_dtype(dtype)))};
  }
  // Under autocast the bias is rounded as the weight is.
  Forward out = run_forward(args, cast_weight ? cast(bias, dtype) : bias);
  out.y = out.y.view(with_last(x, weight.size(0)));
  return out;
}

}  // namespace

std::tuple<at::Tensor, at::Tensor> lora_linear_forward(
    const at::Tensor& x, const at::Tensor& weight, const at::Tensor& lora_a,
    const at::Tensor& lora_b, const std::optional<at::Tensor>& bias, double scaling,
    double dropout_p, const std::optional<at::Tensor>& seed, int64_t row_offset, int64_t col_offset,
    bool cast_weight, const std::optional<at::Tensor>& packed) {
  const Forward out =
      checked_forward(x, weight, lora_a, lora_b, bias, scaling,
                      {dropout_p, seed, row_offset, col_offset}, cast_weight, packed, true);
  return {out.y, out.s};
}

std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor> lora_linear_backward(
    const at::Tensor& grad, const at::Tensor& x, const at::Tensor& weight, const at::Tensor& lora_a,
    const at::Tensor& lora_b, const at::Tensor& s, double scaling, double dropout_p,
    const std::optional<at::Tensor>& seed, int64_t row_offset, int64_t col_offset, bool cast_weight,
    const std::optional<at::Tensor>& packed_t, std::array<bool, 4> output_mask) {
  const NoAutocast no_autocast;
  check_backward(grad, x, weight, lora_a, lora_b, s, scaling, dropout_p, seed, row_offset,
                 col_offset, cast_weight);
  const at::ScalarType dtype = x.scalar_type();
  const bool need_low_rank = output_mask[0] || output_mask[1] || output_mask[2];
  Backward out;
  if (x.numel() == 0 || weight.numel() == 0) {
    if (output_mask[0]) out.dx = at::zeros(x.sizes(), x.options());
    if (output_mask[1]) out.dlora_a = at::zeros(lora_a.sizes(), lora_a.options());
    if (output_mask[2]) out.dlora_b = at::zeros(lora_b.sizes(), lora_b.options());
  } else if (need_low_rank) {
    const BackwardArgs args{flattened(grad.to(dtype)),
                            flattened(x),
                            weight.to(dtype),
                            lora_a,
                            lora_b,
                            s.contiguous(),
                            scaling,
                            DropoutArgs{dropout_p, seed, row_offset, col_offset},
                            pack_for(weight, dtype, packed_t),
                            output_mask[0],
                            output_mask[1],
                            output_mask[2]};
    out = run_backward(args);
    if (output_mask[0]) out.dx = out.dx.view(x.sizes());
  }
  at::Tensor dbias;
  if (output_mask[3]) dbias = sum_of_rows(grad, weight.size(0), accumulation_dtype(dtype));
  return {out.dx, out.dlora_a, out.dlora_b, dbias};
}

at::Tensor lora_linear(const at::Tensor& x, const at::Tensor& weight, const at::Tensor& lora_a,
                       const at::Tensor& lora_b, const std::optional<at::Tensor>& bias,
                       double scaling, double dropout_p, const std::optional<at::Tensor>& seed,
                       int64_t row_offset, int64_t col_offset, bool cast_weight,
                       const std::optional<at::Tensor>& packed,
                       const std::optional<at::Tensor>& /*packed_t*/) {
  return checked_forward(x, weight, lora_a, lora_b, bias, scaling,
                         {dropout_p, seed, row_offset, col_offset}, cast_weight, packed, false)
      .y;
}

TORCH_LIBRARY_IMPL(lora_ext, CPU, m) {
  m.impl("lora_linear", TORCH_FN(lora_linear));
  m.impl("lora_linear_forward", TORCH_FN(lora_linear_forward));
  m.impl("lora_linear_backward", TORCH_FN(lora_linear_backward));
}

// A packed weight is an mkldnn tensor, whose key goes before the CPU's.
TORCH_LIBRARY_IMPL(lora_ext, MkldnnCPU, m) {
  m.impl("lora_linear", TORCH_FN(lora_linear));
  m.impl("lora_linear_forward", TORCH_FN(lora_linear_forward));
  m.impl("lora_linear_backward", TORCH_FN(lora_linear_backward));
}

TORCH_LIBRARY_IMPL(lora_ext, CUDA, m) {
  m.impl("lora_linear", TORCH_FN(lora_linear));
  m.impl("lora_linear_forward", TORCH_FN(lora_linear_forward));
  m.impl("lora_linear_backward", TORCH_FN(lora_linear_backward));
}

}  // namespace lora_ext
