// All kernels of one type: lora_linear_bf16.cu and lora_linear_fp16.cu instantiate them, two files,
// so that they compile side by side.
#pragma once
#include "cuda/stream_launch.h"
#include "kernel/lora_linear_sequence.h"

namespace lora_ext::cuda {

template <class T>
cudaError_t forward_on(const plan::Plan& plan, const kernel::LoraLinearForward& operands,
                       cudaStream_t stream) {
  StreamLaunch launch(stream);
  kernel::LoraLinearSequence<T, StreamLaunch>(plan, operands, launch).forward(operands);
  return launch.error();
}

template <class T>
cudaError_t backward_on(const plan::Plan& plan, const kernel::LoraLinearBackward& operands,
                        cudaStream_t stream) {
  StreamLaunch launch(stream);
  kernel::LoraLinearSequence<T, StreamLaunch>(plan, operands, launch).backward(operands);
  return launch.error();
}

}  // namespace lora_ext::cuda
