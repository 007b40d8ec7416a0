#include "cuda/lora_linear_launch.h"

namespace lora_ext::cuda {

cudaError_t forward_bf16(const plan::Plan& plan, const kernel::LoraLinearForward& operands,
                         cudaStream_t stream) {
  return forward_on<__nv_bfloat16>(plan, operands, stream);
}
cudaError_t backward_bf16(const plan::Plan& plan, const kernel::LoraLinearBackward& operands,
                          cudaStream_t stream) {
  return backward_on<__nv_bfloat16>(plan, operands, stream);
}

}  // namespace lora_ext::cuda
