#include "kernels/launch/driver.h"
#include "kernels/launch/instances.h"
#include "kernels/lora_grouped.h"
#include "kernels/lora_linear.h"

namespace lora_ext::cuda {
namespace {

template <class Operands>
std::string launch_one(Half half, const plan::Plan& plan, const Operands& operands, void* stream) {
  StreamLaunch launch(static_cast<cudaStream_t>(stream));
  const bool known = with_half(half, [&](auto type) {
    kernel::launch_lora_linear<typename decltype(type)::type>(plan, operands, launch);
  });
  return text_of(known ? launch.error() : cudaErrorInvalidValue);
}

template <class Operands>
std::string launch_many(Half half, const plan::Plan& plan, const Operands& operands, void* stream) {
  StreamLaunch launch(static_cast<cudaStream_t>(stream));
  const bool known = with_half(half, [&](auto type) {
    kernel::launch_lora_grouped<typename decltype(type)::type>(plan, operands, launch);
  });
  return text_of(known ? launch.error() : cudaErrorInvalidValue);
}

}  // namespace

std::string launch_forward(Half half, const plan::Plan& plan,
                           const kernel::LoraLinearForward& operands, void* stream) {
  return launch_one(half, plan, operands, stream);
}

std::string launch_backward(Half half, const plan::Plan& plan,
                            const kernel::LoraLinearBackward& operands, void* stream) {
  return launch_one(half, plan, operands, stream);
}

std::string launch_grouped_forward(Half half, const plan::Plan& plan,
                                   const kernel::LoraGroupedForward& operands, void* stream) {
  return launch_many(half, plan, operands, stream);
}

std::string launch_grouped_backward(Half half, const plan::Plan& plan,
                                    const kernel::LoraGroupedBackward& operands, void* stream) {
  return launch_many(half, plan, operands, stream);
}

}  // namespace lora_ext::cuda
