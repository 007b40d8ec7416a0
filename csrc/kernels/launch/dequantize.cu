// The instances and grids of the dequantisation kernels.
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include "kernels/dequantize.h"
#include "kernels/dequantize/formats.h"
#include "kernels/launch/driver.h"

namespace lora_ext::cuda {
namespace {

template <class T, class Params>
std::string launch(void (*kernel)(Params), const Params& params, void* stream) {
  constexpr int64_t kBlockValues = kernel::DequantizedTile<T>::kBlockValues;
  cudaLaunchConfig_t launch{};
  launch.gridDim = dim3(static_cast<unsigned>((params.count + kBlockValues - 1) / kBlockValues));
  launch.blockDim = dim3(kernel::kDequantizeThreads),
  launch.stream = static_cast<cudaStream_t>(stream);
  return text_of(cudaLaunchKernelEx(&launch, kernel, params));
}

}  // namespace

std::string launch_dequantize(Floating type, const kernel::Dequantize4bitParams& params,
                              void* stream) {
  switch (type) {
    case Floating::kFloat32:
      return launch<float>(kernel::dequantize_4bit<float>, params, stream);
    case Floating::kBFloat16:
      return launch<__nv_bfloat16>(kernel::dequantize_4bit<__nv_bfloat16>, params, stream);
    case Floating::kFloat16:
      return launch<__half>(kernel::dequantize_4bit<__half>, params, stream);
    default:
      return text_of(cudaErrorInvalidValue);
  }
}

std::string launch_dequantize(Floating type, const kernel::Dequantize8bitParams& params,
                              void* stream) {
  switch (type) {
    case Floating::kFloat32:
      return launch<float>(kernel::dequantize_8bit<float>, params, stream);
    case Floating::kBFloat16:
      return launch<__nv_bfloat16>(kernel::dequantize_8bit<__nv_bfloat16>, params, stream);
    case Floating::kFloat16:
      return launch<__half>(kernel::dequantize_8bit<__half>, params, stream);
    default:
      return text_of(cudaErrorInvalidValue);
  }
}

}  // namespace lora_ext::cuda
