#include "op/launch/launch_parts.h"

#include <ATen/ops/empty.h>
#include <c10/core/impl/VirtualGuardImpl.h>

#include "op/launch/kernel_launch.h"

namespace lora_ext::kernel_launch {

int64_t pitch_of(const at::Tensor& tensor) {
  return tensor.size(0) == 1 ? (tensor.size(1) + 7) / 8 * 8 : tensor.stride(0);
}

bool aligned(const at::Tensor& tensor) {
  const auto bytes = static_cast<int64_t>(tensor.element_size());
  const int64_t pitch = pitch_of(tensor);
  return tensor.stride(-1) == 1 && pitch * bytes % 16 == 0 && pitch >= tensor.size(1) &&
         reinterpret_cast<uintptr_t>(tensor.const_data_ptr()) % 16 == 0;
}

bool aligned_rows(int64_t columns) { return columns % 8 == 0; }

kernel::Mask mask_of(const DropoutArgs& dropout) {
  kernel::Mask mask{};
  mask.keep_count = philox::kKeepOne, mask.keep_scale = 1.f;
  if (dropout.enabled()) {
    mask = {dropout.seed->const_data_ptr<int64_t>(), dropout.first_row(), dropout.first_col(),
            dropout.keep_count(), static_cast<float>(dropout.keep_scale())};
  }
  return mask;
}

at::Tensor workspace_for(int64_t bytes, const at::Tensor& like) {
  return at::empty({bytes}, like.options().dtype(at::kByte));
}

void* stream_of(const at::Device& device) {
  if (!device.is_cuda()) return nullptr;
  return c10::impl::VirtualGuardImpl(device.type()).getStream(device).native_handle();
}

int index_of(const at::Device& device) {
  if (device.has_index() || !device.is_cuda()) return device.index();
  return c10::impl::VirtualGuardImpl(device.type()).getDevice().index();
}

cuda::Half half_of(at::ScalarType dtype) {
  return dtype == at::kHalf ? cuda::Half::kFloat16 : cuda::Half::kBFloat16;
}

void check_launch(const std::string& error, const at::Device& device) {
  if (error.empty()) return;
  // cudaErrorMemoryAllocation: a caller may handle it, for example with a smaller batch.
  TORCH_CHECK_WITH(OutOfMemoryError, error.find("out of memory") == std::string::npos,
                   "lora_ext: launching the kernels on ", device, " failed: ", error);
  throw LaunchError({__func__, __FILE__, static_cast<uint32_t>(__LINE__)},
                    c10::str("lora_ext: launching the kernels on ", device, " failed: ", error));
}

}  // namespace lora_ext::kernel_launch
