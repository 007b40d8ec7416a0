#include "cuda/error.h"
#include "cuda/grouped_instances.h"
#include "cuda/lora_grouped.h"

namespace lora_ext::cuda {
namespace {

template <class Operands>
std::string launch(Half half, const plan::Plan& plan, const Operands& operands, void* stream) {
  StreamLaunch launch(static_cast<cudaStream_t>(stream));
  half == Half::kBFloat16 ? kernel::launch_lora_grouped<__nv_bfloat16>(plan, operands, launch)
                          : kernel::launch_lora_grouped<__half>(plan, operands, launch);
  return text_of(launch.error());
}

}  // namespace

std::string launch_grouped_forward(Half half, const plan::Plan& plan,
                                   const kernel::LoraGroupedForward& operands, void* stream) {
  return launch(half, plan, operands, stream);
}

std::string launch_grouped_backward(Half half, const plan::Plan& plan,
                                    const kernel::LoraGroupedBackward& operands, void* stream) {
  return launch(half, plan, operands, stream);
}

}  // namespace lora_ext::cuda
