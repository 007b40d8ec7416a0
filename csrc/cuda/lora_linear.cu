#include <cuda_runtime.h>

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

int attribute(cudaDeviceAttr what, int device) {
  int value = 0;
  return cudaDeviceGetAttribute(&value, what, device) == cudaSuccess ? value : 0;
}

// It is the caller's from here on: left behind, torch would report it for its own next kernel.
std::string text_of(cudaError_t error) {
  if (error == cudaSuccess) return "";
  cudaGetLastError();
  return cudaGetErrorString(error);
}

}  // namespace

bool has_kernels(bool is_cuda) { return is_cuda; }

plan::Card card_of(int device) {
  cudaDeviceProp properties{};
  if (cudaGetDeviceProperties(&properties, device) != cudaSuccess) properties.name[0] = 0;
  return {10 * attribute(cudaDevAttrComputeCapabilityMajor, device) +
              attribute(cudaDevAttrComputeCapabilityMinor, device),
          attribute(cudaDevAttrMultiProcessorCount, device),
          attribute(cudaDevAttrMaxSharedMemoryPerMultiprocessor, device),
          attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin, device),
          properties.name,
          has_tensor_maps(),
          kHasSm90aCode};
}

bool is_capturing(void* stream) {
  cudaStreamCaptureStatus status = cudaStreamCaptureStatusNone;
  const cudaError_t error = cudaStreamIsCapturing(static_cast<cudaStream_t>(stream), &status);
  return error != cudaSuccess || status != cudaStreamCaptureStatusNone;
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
