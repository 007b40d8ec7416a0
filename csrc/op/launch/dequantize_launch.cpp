// Current stream and device through c10's virtual guard, as in dropout_launch.cpp.
#include "op/launch/dequantize_launch.h"

#include <c10/core/DeviceGuard.h>
#include <c10/core/impl/VirtualGuardImpl.h>

#include "common/check.h"
#include "kernels/dequantize.h"

namespace lora_ext::cuda {
namespace {

Floating floating_of(at::ScalarType dtype) {
  switch (dtype) {
    case at::kBFloat16:
      return Floating::kBFloat16;
    case at::kHalf:
      return Floating::kFloat16;
    default:
      return Floating::kFloat32;
  }
}

bool is_aligned(const void* pointer, uintptr_t bytes) {
  return reinterpret_cast<uintptr_t>(pointer) % bytes == 0;
}

template <class Params>
void run(Params& params, const at::Tensor& out) {
  params.out = out.mutable_data_ptr();
  params.count = out.numel();
  params.aligned &= is_aligned(params.out, 16);
  const c10::DeviceGuard device(out.device());
  const c10::impl::VirtualGuardImpl guard(out.device().type());
  void* stream = guard.getStream(out.device()).native_handle();
  const std::string error = launch_dequantize(floating_of(out.scalar_type()), params, stream);
  LORA_EXT_CHECK(error.empty(), "dequantising on ", out.device(), " failed: ", error);
}

}  // namespace

void dequantize(kernel::Dequantize4bitParams params, const at::Tensor& out) {
  params.aligned = is_aligned(params.packed, 4);
  run(params, out);
}

void dequantize(kernel::Dequantize8bitParams params, const at::Tensor& out) {
  const int64_t chunk = 16 / static_cast<int64_t>(out.element_size());
  params.columns = static_cast<uint32_t>(out.size(1));
  params.aligned = is_aligned(params.codes, 8) && out.size(1) % chunk == 0;
  run(params, out);
}

}  // namespace lora_ext::cuda
