#include <cuda_runtime.h>

#include "cuda/error.h"
#include "cuda/instances.h"
#include "cuda/lora_linear.h"
#include "cuda/tensor_map.h"

namespace lora_ext::cuda {

namespace {

// setup.py knows; without, kernels on wgmma are empty on every card.
#ifdef LORA_EXT_WITH_SM90A
constexpr bool kHasSm90aCode = true;
#else
constexpr bool kHasSm90aCode = false;
#endif

template <class Operands>
std::string launch(Half half, const plan::Plan& plan, const Operands& operands, void* stream) {
  StreamLaunch launch(static_cast<cudaStream_t>(stream));
  half == Half::kBFloat16 ? kernel::launch_lora_linear<__nv_bfloat16>(plan, operands, launch)
                          : kernel::launch_lora_linear<__half>(plan, operands, launch);
  return text_of(launch.error());
}

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

std::optional<uint64_t> stream_id(void* stream) {
  unsigned long long id = 0;
  const cudaError_t error = cudaStreamGetId(static_cast<cudaStream_t>(stream), &id);
  return text_of(error).empty() ? std::optional<uint64_t>(id) : std::nullopt;
}

std::string clear(int32_t* numbers, int64_t count, void* stream) {
  return text_of(cudaMemsetAsync(numbers, 0, static_cast<size_t>(count) * sizeof *numbers,
                                 static_cast<cudaStream_t>(stream)));
}

std::string launch_forward(Half half, const plan::Plan& plan,
                           const kernel::LoraLinearForward& operands, void* stream) {
  return launch(half, plan, operands, stream);
}

std::string launch_backward(Half half, const plan::Plan& plan,
                            const kernel::LoraLinearBackward& operands, void* stream) {
  return launch(half, plan, operands, stream);
}

}  // namespace lora_ext::cuda
