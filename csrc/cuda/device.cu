#include <cuda_runtime.h>

#include "cuda/device.h"
#include "cuda/error.h"
#include "cuda/tensor_map.h"

namespace lora_ext::cuda {
namespace {

// Defined by setup.py; without it, kernels with wgmma are empty on every card.
#ifdef LORA_EXT_WITH_SM90A
constexpr bool kHasSm90aCode = true;
#else
constexpr bool kHasSm90aCode = false;
#endif

}  // namespace

bool is_built() { return true; }
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

}  // namespace lora_ext::cuda
