// The instances and grids of the dequantisation kernels, of any format.
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <variant>

#include "kernels/dequantize.h"
#include "kernels/dequantize/formats.h"
#include "kernels/launch/driver.h"

namespace lora_ext::cuda {
namespace {

template <class T, class Params>
std::string launch(const Params& params, void* stream) {
  constexpr int64_t kBlockValues = kernel::DequantizedTile<T>::kBlockValues;
  cudaLaunchConfig_t launch{};
  launch.gridDim = dim3(static_cast<unsigned>((params.count + kBlockValues - 1) / kBlockValues));
  launch.blockDim = dim3(kernel::kDequantizeThreads),
  launch.stream = static_cast<cudaStream_t>(stream);
  return text_of(cudaLaunchKernelEx(&launch, kernel::dequantize_kernel<T>(params), params));
}

template <class Params>
std::string launch_as(Floating type, const Params& params, void* stream) {
  switch (type) {
    case Floating::kFloat32:
      return launch<float>(params, stream);
    case Floating::kBFloat16:
      return launch<__nv_bfloat16>(params, stream);
    case Floating::kFloat16:
      return launch<__half>(params, stream);
    default:
      return text_of(cudaErrorInvalidValue);
  }
}

}  // namespace

std::string launch_dequantize(Floating type, const kernel::DequantizeParams& params, void* stream) {
  return std::visit([&](const auto& format) { return launch_as(type, format, stream); }, params);
}

}  // namespace lora_ext::cuda
