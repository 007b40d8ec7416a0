// The op layer: lora_ext::lora_linear, lora_linear_forward and lora_linear_backward for real
// tensors on the CPU and on CUDA. Checks, flattens to 2-D, and calls the route of the device.
#include <ATen/ops/zeros.h>
#include <c10/util/Exception.h>
#include <torch/library.h>

#include "op/base.h"
#include "op/checks.h"
#include "op/flat.h"
#include "op/flatten.h"
#include "route/equal_blocks.h"
#include "route/route.h"

namespace lora_ext {
namespace {

void check_row_block(int64_t row_block) {
  TORCH_CHECK(row_block >= 0, "lora_ext.lora_linear: expected row_block >= 0, but got ", row_block);
}

Forward checked_forward(const at::Tensor& x, const Base& base, const Update& update,
                        int64_t row_block, bool need_s) {
  const NoAutocast no_autocast;
  check_forward(x, base, update);
  check_row_block(row_block);
  const at::ScalarType dtype = x.scalar_type();
  const int64_t out_features = update.out_features();
  const ForwardArgs args{flattened(x), base_for(base, dtype), update, need_s};
  if (args.x.size(0) == 0 || base.weight.numel() == 0) {
    return {
        bias_alone(x, base, out_features),
        at::zeros({args.x.size(0), update.rank()}, x.options().dtype(accumulation_dtype(dtype)))};
  }
  Forward out = row_block > 0 ? route::forward_in_blocks(args, row_block) : route::forward(args);
  out.y = out.y.view(with_last(x, out_features));
  return out;
}

at::Tensor lora_linear(const at::Tensor& x, const Base& base, const Update& update,
                       int64_t row_block) {
  return checked_forward(x, base, update, row_block, false).y;
}

std::tuple<at::Tensor, at::Tensor> lora_linear_forward(const at::Tensor& x, const Base& base,
                                                       const Update& update, int64_t row_block) {
  const Forward out = checked_forward(x, base, update, row_block, true);
  return {out.y, out.s};
}

std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor> lora_linear_backward(
    const at::Tensor& grad, const at::Tensor& x, const Base& base, const Update& update,
    const at::Tensor& s, std::array<bool, 4> output_mask, int64_t row_block) {
  const NoAutocast no_autocast;
  check_backward(grad, x, base, update, s);
  check_row_block(row_block);
  const at::ScalarType dtype = x.scalar_type();
  Backward out;
  if (x.numel() == 0 || base.weight.numel() == 0) {
    out = zero_gradients(x, update, output_mask[0], output_mask[1], output_mask[2]);
  } else if (output_mask[0] || output_mask[1] || output_mask[2]) {
    const BackwardArgs args{flattened(grad.to(dtype)),
                            flattened(x),
                            base_for(base, dtype),
                            update,
                            s.contiguous(),
                            output_mask[0],
                            output_mask[1],
                            output_mask[2]};
    out = row_block > 0 ? route::backward_in_blocks(args, row_block) : route::backward(args);
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
