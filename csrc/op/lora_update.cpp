// The op layer: lora_ext::lora_update, lora_update_forward and lora_update_backward for real
// tensors on the CPU and on CUDA: a LoRA linear whose base has computed its y already.
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include "op/checks.h"
#include "op/flat.h"
#include "op/flatten.h"
#include "route/route.h"

namespace lora_ext {
namespace {

Forward checked_forward(const at::Tensor& y, const at::Tensor& x, const Update& update,
                        bool need_s) {
  const NoAutocast no_autocast;
  check_forward(x, Base::given(y), update);
  const at::Tensor rows = flattened(x);
  if (x.numel() == 0 || y.numel() == 0) {
    const auto sums = x.options().dtype(accumulation_dtype(x.scalar_type()));
    return {y.clone(at::MemoryFormat::Contiguous), at::zeros({rows.size(0), update.rank()}, sums)};
  }
  Forward out = route::forward({rows, Base::given(flattened(y)), update, need_s});
  out.y = out.y.view(y.sizes());
  return out;
}

at::Tensor lora_update(const at::Tensor& y, const at::Tensor& x, const Update& update) {
  return checked_forward(y, x, update, false).y;
}

std::tuple<at::Tensor, at::Tensor> lora_update_forward(const at::Tensor& y, const at::Tensor& x,
                                                       const Update& update) {
  const Forward out = checked_forward(y, x, update, true);
  return {out.y, out.s};
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> lora_update_backward(
    const at::Tensor& grad, const at::Tensor& x, const Update& update, const at::Tensor& s,
    std::array<bool, 3> output_mask) {
  const NoAutocast no_autocast;
  check_backward(grad, x, Base::given(), update, s);
  Backward out;
  if (x.numel() == 0 || grad.numel() == 0) {
    out = zero_gradients(x, update, output_mask[0], output_mask[1], output_mask[2]);
  } else if (output_mask[0] || output_mask[1] || output_mask[2]) {
    out = route::backward({flattened(grad), flattened(x), Base::given(), update, s.contiguous(),
                           output_mask[0], output_mask[1], output_mask[2]});
    if (output_mask[0]) out.dx = out.dx.view(x.sizes());
  }
  return {out.dx, out.dlora_a, out.dlora_b};
}

void register_lora_update(torch::Library& m) {
  m.impl("lora_update", TORCH_FN(flat::lora_update<lora_update>));
  m.impl("lora_update_forward", TORCH_FN(flat::lora_update_forward<lora_update_forward>));
  m.impl("lora_update_backward", TORCH_FN(flat::lora_update_backward<lora_update_backward>));
}

}  // namespace

TORCH_LIBRARY_IMPL(lora_ext, CPU, m) { register_lora_update(m); }
TORCH_LIBRARY_IMPL(lora_ext, CUDA, m) { register_lora_update(m); }

}  // namespace lora_ext
