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
  launch.gridDim = dim3(static_cast<unsigned>((params.count + kBlockValues - 1) / kBlockValues),
                        static_cast<unsigned>(params.matrices));
  launch.blockDim = dim3(kernel::kDequantizeThreads),
  launch.stream = static_cast<cudaStream_t>(stream);
  return text_of(cudaLaunchKernelEx(&launch, kernel::dequantize_kernel<T>(params), params));
}

}  // namespace

std::string launch_dequantize(Dtype dtype, const kernel::DequantizeParams& params, void* stream) {
  std::string error = text_of(cudaErrorInvalidValue);
  const auto launch_format = [&](const auto& format) {
    with_type<float, __nv_bfloat16, __half>(
        dtype, [&](auto type) { error = launch<typename decltype(type)::type>(format, stream); });
  };
  std::visit(launch_format, params);
  return error;
}

}  // namespace lora_ext::cuda
