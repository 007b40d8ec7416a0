#include "kernels/launch/driver.h"
#include "kernels/launch/instances.h"
#include "kernels/lora_grouped.h"
#include "kernels/lora_linear.h"

namespace lora_ext::cuda {
namespace {

// Calls run(launch, T{}) for the element type.
template <class Run>
std::string launch_half(Half half, void* stream, const Run& run) {
  StreamLaunch launch(static_cast<cudaStream_t>(stream));
  switch (half) {
    case Half::kBFloat16:
      run(launch, __nv_bfloat16{});
      break;
    case Half::kFloat16:
      run(launch, __half{});
      break;
    default:
      return "expected bfloat16 or float16 activations";
  }
  return text_of(launch.error());
}

template <class Operands>
std::string launch_one(Half half, const plan::Plan& plan, const Operands& operands, void* stream) {
  return launch_half(half, stream, [&](StreamLaunch& launch, auto element) {
    kernel::launch_lora_linear<decltype(element)>(plan, operands, launch);
  });
}

template <class Operands>
std::string launch_many(Half half, const plan::Plan& plan, const Operands& operands, void* stream) {
  return launch_half(half, stream, [&](StreamLaunch& launch, auto element) {
    kernel::launch_lora_grouped<decltype(element)>(plan, operands, launch);
  });
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
