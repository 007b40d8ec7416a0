#include "cuda/error.h"
#include "cuda/instances.h"
#include "cuda/lora_linear.h"

namespace lora_ext::cuda {
namespace {

template <class Operands>
std::string launch(Half half, const plan::Plan& plan, const Operands& operands, void* stream) {
  StreamLaunch launch(static_cast<cudaStream_t>(stream));
  half == Half::kBFloat16 ? kernel::launch_lora_linear<__nv_bfloat16>(plan, operands, launch)
                          : kernel::launch_lora_linear<__half>(plan, operands, launch);
  return text_of(launch.error());
}

}  // namespace

std::string launch_forward(Half half, const plan::Plan& plan,
                           const kernel::LoraLinearForward& operands, void* stream) {
  return launch(half, plan, operands, stream);
}

std::string launch_backward(Half half, const plan::Plan& plan,
                            const kernel::LoraLinearBackward& operands, void* stream) {
  return launch(half, plan, operands, stream);
}

}  // namespace lora_ext::cuda
