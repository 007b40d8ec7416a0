// Autocast: x goes to the autocast dtype. The adapters keep their dtype unless they are float64,
// so that float32 adapters are never rounded to half. The weight is not cast here: the op casts it
// inside forward and again inside backward, so that no cast copy is saved.
#include <ATen/autocast_mode.h>
#include <torch/library.h>

#include "op/ops.h"

namespace lora_ext {
namespace {

at::Tensor adapter_for(const at::Tensor& adapter, at::ScalarType dtype, c10::DeviceType device) {
  const bool keep = adapter.scalar_type() == dtype || adapter.scalar_type() == at::kFloat;
  return keep ? adapter : at::autocast::cached_cast(dtype, adapter, device);
}

template <c10::DispatchKey key, c10::DeviceType device>
at::Tensor lora_linear_autocast(const at::Tensor& x, const at::Tensor& weight,
                                const at::Tensor& lora_a, const at::Tensor& lora_b,
                                const std::optional<at::Tensor>& bias, double scaling,
                                double dropout_p, const std::optional<at::Tensor>& seed,
                                c10::SymInt row_offset, c10::SymInt col_offset,
                                bool /*cast_weight*/, const std::optional<at::Tensor>& packed,
                                const std::optional<at::Tensor>& packed_t) {
  const c10::impl::ExcludeDispatchKeyGuard guard(key);
  const at::ScalarType dtype = at::autocast::get_autocast_dtype(device);
  return ops::lora_linear(at::autocast::cached_cast(dtype, x, device), weight,
                          adapter_for(lora_a, dtype, device), adapter_for(lora_b, dtype, device),
                          bias, scaling, dropout_p, seed, std::move(row_offset),
                          std::move(col_offset), /*cast_weight=*/true, packed, packed_t);
}

}  // namespace

TORCH_LIBRARY_IMPL(lora_ext, AutocastCPU, m) {
  m.impl("lora_linear",
         TORCH_FN((lora_linear_autocast<c10::DispatchKey::AutocastCPU, c10::DeviceType::CPU>)));
}

TORCH_LIBRARY_IMPL(lora_ext, AutocastCUDA, m) {
  m.impl("lora_linear",
         TORCH_FN((lora_linear_autocast<c10::DispatchKey::AutocastCUDA, c10::DeviceType::CUDA>)));
}

}  // namespace lora_ext
