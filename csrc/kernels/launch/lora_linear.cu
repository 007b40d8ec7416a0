#include "kernels/launch/driver.h"
#include "kernels/launch/instances.h"
#include "kernels/lora_grouped.h"
#include "kernels/lora_linear.h"

namespace lora_ext::cuda {
namespace {

template <class Operands>
std::string launch(Dtype dtype, const plan::Plan& plan, const Operands& operands, void* stream) {
  StreamLaunch launch(static_cast<cudaStream_t>(stream));
  const bool known = with_type<__nv_bfloat16, __half>(dtype, [&](auto type) {
    kernel::launch_lora<typename decltype(type)::type>(plan, operands, launch);
  });
  return text_of(known ? launch.error() : cudaErrorInvalidValue);
}

}  // namespace

std::string launch_lora(Dtype dtype, const plan::Plan& plan,
                        const kernel::LoraLinearForward& operands, void* stream) {
  return launch(dtype, plan, operands, stream);
}
std::string launch_lora(Dtype dtype, const plan::Plan& plan,
                        const kernel::LoraLinearBackward& operands, void* stream) {
  return launch(dtype, plan, operands, stream);
}
std::string launch_lora(Dtype dtype, const plan::Plan& plan,
                        const kernel::LoraGroupedForward& operands, void* stream) {
  return launch(dtype, plan, operands, stream);
}
std::string launch_lora(Dtype dtype, const plan::Plan& plan,
                        const kernel::LoraGroupedBackward& operands, void* stream) {
  return launch(dtype, plan, operands, stream);
}

}  // namespace lora_ext::cuda
