// Autocast: x is cast to the autocast dtype. The adapters keep their dtype unless they are float64,
// so that float32 adapters are never rounded to half. The weight is not cast here: the op casts it
// inside forward and again inside backward, so that no cast copy is saved. A given y keeps its
// dtype, which is the result's.
#include <ATen/autocast_mode.h>

#include "op/ops.h"

namespace lora_ext {
namespace {

Update update_for(const Update& update, at::ScalarType dtype, c10::DeviceType device) {
  Update own = update;
  for (Factors* factors : {&own.lora_a, &own.lora_b}) {
    for (at::Tensor& factor : *factors) {
      if (factor.scalar_type() == dtype || factor.scalar_type() == at::kFloat) continue;
      factor = at::autocast::cached_cast(dtype, factor, device);
    }
  }
  if (own.grouping && own.grouping->scaling.defined() &&
      own.grouping->scaling.scalar_type() == at::kDouble) {
    own.grouping->scaling = own.grouping->scaling.to(at::kFloat);
  }
  return own;
}

template <c10::DispatchKey key, c10::DeviceType device>
at::Tensor lora_autocast(const at::Tensor& x, const Base& base, const Update& update) {
  const c10::impl::ExcludeDispatchKeyGuard guard(key);
  const at::ScalarType dtype = at::autocast::get_autocast_dtype(device);
  Base own = base;
  own.cast_weight = true;
  return ops::lora(at::autocast::cached_cast(dtype, x, device), own,
                   update_for(update, dtype, device));
}

}  // namespace

TORCH_LIBRARY_IMPL(lora_ext, AutocastCPU, m) {
  register_lora<lora_autocast<c10::DispatchKey::AutocastCPU, c10::DeviceType::CPU>>(m);
}

TORCH_LIBRARY_IMPL(lora_ext, AutocastCUDA, m) {
  register_lora<lora_autocast<c10::DispatchKey::AutocastCUDA, c10::DeviceType::CUDA>>(m);
}

}  // namespace lora_ext
