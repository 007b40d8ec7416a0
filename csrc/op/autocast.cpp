// Autocast: x goes to the autocast dtype. The adapters keep their dtype unless they are float64,
// so that float32 adapters are never rounded to half. The weight is not cast here: the op casts it
// inside forward and again inside backward, so that no cast copy is saved. A given y keeps its
// dtype, which is the result's.
#include <ATen/autocast_mode.h>
#include <torch/library.h>

#include "op/flat.h"
#include "op/grouped_ops.h"
#include "op/ops.h"

namespace lora_ext {
namespace {

at::Tensor adapter_for(const at::Tensor& adapter, at::ScalarType dtype, c10::DeviceType device) {
  const bool keep = adapter.scalar_type() == dtype || adapter.scalar_type() == at::kFloat;
  return keep ? adapter : at::autocast::cached_cast(dtype, adapter, device);
}

Update update_for(const Update& update, at::ScalarType dtype, c10::DeviceType device) {
  Update own = update;
  own.lora_a = adapter_for(update.lora_a, dtype, device);
  own.lora_b = adapter_for(update.lora_b, dtype, device);
  return own;
}

GroupedUpdate update_for(const GroupedUpdate& update, at::ScalarType dtype,
                         c10::DeviceType device) {
  GroupedUpdate own = update;
  for (at::Tensor& a : own.lora_a) a = adapter_for(a, dtype, device);
  for (at::Tensor& b : own.lora_b) b = adapter_for(b, dtype, device);
  own.scaling =
      update.scaling.scalar_type() == at::kDouble ? update.scaling.to(at::kFloat) : update.scaling;
  return own;
}

Base cast(const Base& base) {
  Base own = base;
  own.cast_weight = true;
  return own;
}

template <c10::DispatchKey key, c10::DeviceType device>
at::Tensor lora_linear_autocast(const at::Tensor& x, const Base& base, const Update& update,
                                int64_t row_block) {
  const c10::impl::ExcludeDispatchKeyGuard guard(key);
  const at::ScalarType dtype = at::autocast::get_autocast_dtype(device);
  return ops::lora_linear(at::autocast::cached_cast(dtype, x, device), cast(base),
                          update_for(update, dtype, device), row_block);
}

template <c10::DispatchKey key, c10::DeviceType device>
at::Tensor lora_update_autocast(const at::Tensor& y, const at::Tensor& x, const Update& update) {
  const c10::impl::ExcludeDispatchKeyGuard guard(key);
  const at::ScalarType dtype = at::autocast::get_autocast_dtype(device);
  return ops::lora_update(y, at::autocast::cached_cast(dtype, x, device),
                          update_for(update, dtype, device));
}

template <c10::DispatchKey key, c10::DeviceType device>
at::Tensor lora_linear_grouped_autocast(const at::Tensor& x, const Base& base,
                                        const GroupedUpdate& update) {
  const c10::impl::ExcludeDispatchKeyGuard guard(key);
  const at::ScalarType dtype = at::autocast::get_autocast_dtype(device);
  return ops::lora_linear_grouped(at::autocast::cached_cast(dtype, x, device), cast(base),
                                  update_for(update, dtype, device));
}

template <c10::DispatchKey key, c10::DeviceType device>
at::Tensor lora_update_grouped_autocast(const at::Tensor& y, const at::Tensor& x,
                                        const GroupedUpdate& update) {
  const c10::impl::ExcludeDispatchKeyGuard guard(key);
  const at::ScalarType dtype = at::autocast::get_autocast_dtype(device);
  return ops::lora_update_grouped(y, at::autocast::cached_cast(dtype, x, device),
                                  update_for(update, dtype, device));
}

template <c10::DispatchKey key, c10::DeviceType device>
void register_autocast(torch::Library& m) {
  m.impl("lora_linear", TORCH_FN((flat::lora_linear<lora_linear_autocast<key, device>>)));
  m.impl("lora_update", TORCH_FN((flat::lora_update<lora_update_autocast<key, device>>)));
  m.impl("lora_linear_grouped",
         TORCH_FN((flat::lora_linear_grouped<lora_linear_grouped_autocast<key, device>>)));
  m.impl("lora_update_grouped",
         TORCH_FN((flat::lora_update_grouped<lora_update_grouped_autocast<key, device>>)));
}

}  // namespace

TORCH_LIBRARY_IMPL(lora_ext, AutocastCPU, m) {
  register_autocast<c10::DispatchKey::AutocastCPU, c10::DeviceType::CPU>(m);
}

TORCH_LIBRARY_IMPL(lora_ext, AutocastCUDA, m) {
  register_autocast<c10::DispatchKey::AutocastCUDA, c10::DeviceType::CUDA>(m);
}

}  // namespace lora_ext
