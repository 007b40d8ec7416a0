#include <cuda_runtime.h>

#include "cuda/error.h"
#include "cuda/lora_linear.h"
#include "cuda/tensor_map.h"

namespace lora_ext::cuda {

cudaError_t forward_bf16(const plan::Plan&, const kernel::LoraLinearForward&, cudaStream_t);
cudaError_t backward_bf16(const plan::Plan&, const kernel::LoraLinearBackward&, cudaStream_t);
cudaError_t forward_fp16(const plan::Plan&, const kernel::LoraLinearForward&, cudaStream_t);
cudaError_t backward_fp16(const plan::Plan&, const kernel::LoraLinearBackward&, cudaStream_t);

namespace {

// setup.py knows; without, kernels on wgmma are empty on every card.
#ifdef LORA_EXT_WITH_SM90A
constexpr bool kHasSm90aCode = true;
#else
constexpr bool kHasSm90aCode = false;
#endif

}  // namespace

bool has_kernels(bool is_cuda) { return is_cuda; }

plan::Card card_of(int device) {
  plan::Card card{};
  cudaDeviceProp properties{};
  card.error = text_of(cudaGetDeviceProperties(&properties, device));
  if (!card.error.empty()) return card;
  card.arch = 10 * properties.major + properties.minor;
  card.sms = properties.multiProcessorCount;
  card.shared_per_sm = static_cast<int64_t>(properties.sharedMemPerMultiprocessor);
  card.shared_per_block = static_cast<int64_t>(properties.sharedMemPerBlockOptin);
  card.name = properties.name;
  card.tensor_maps = has_tensor_maps();
  card.sm90a_code = kHasSm90aCode;
  return card;
}

bool is_capturing(void* stream) {
  cudaStreamCaptureStatus status = cudaStreamCaptureStatusNone;
  const cudaError_t error = cudaStreamIsCapturing(static_cast<cudaStream_t>(stream), &status);
  return !text_of(error).empty() || status != cudaStreamCaptureStatusNone;
}

std::string launch_forward(Half half, const plan::Plan& plan,
                           const kernel::LoraLinearForward& operands, void* stream) {
  const auto run = half == Half::kBFloat16 ? forward_bf16 : forward_fp16;
  return text_of(run(plan, operands, static_cast<cudaStream_t>(stream)));
}

std::string launch_backward(Half half, const plan::Plan& plan,
                            const kernel::LoraLinearBackward& operands, void* stream) {
  const auto run = half == Half::kBFloat16 ? backward_bf16 : backward_fp16;
  return text_of(run(plan, operands, static_cast<cudaStream_t>(stream)));
}

}  // namespace lora_ext::cuda
