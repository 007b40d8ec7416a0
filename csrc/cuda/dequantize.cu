// The grids of the kernels that dequantise, and their instances.
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include "cuda/dequantize.h"
#include "kernel/dequantize_4bit.h"
#include "kernel/dequantize_8bit.h"

namespace lora_ext::cuda {
namespace {

template <class T, class Params>
cudaError_t launch(void (*kernel)(Params), const Params& params, cudaStream_t stream) {
  constexpr int64_t kBlockValues = kernel::DequantizedTile<T>::kBlockValues;
  cudaLaunchConfig_t launch{};
  launch.gridDim = dim3(static_cast<unsigned>((params.count + kBlockValues - 1) / kBlockValues));
  launch.blockDim = dim3(kernel::kDequantizeThreads), launch.stream = stream;
  return cudaLaunchKernelEx(&launch, kernel, params);
}

}  // namespace

cudaError_t launch_dequantize(Floating type, const kernel::Dequantize4bitParams& params,
                              cudaStream_t stream) {
  switch (type) {
    case Floating::kFloat32:
      return launch<float>(kernel::dequantize_4bit<float>, params, stream);
    case Floating::kBFloat16:
      return launch<__nv_bfloat16>(kernel::dequantize_4bit<__nv_bfloat16>, params, stream);
    case Floating::kFloat16:
      return launch<__half>(kernel::dequantize_4bit<__half>, params, stream);
  }
  return cudaErrorInvalidValue;
}

cudaError_t launch_dequantize(Floating type, const kernel::Dequantize8bitParams& params,
                              cudaStream_t stream) {
  switch (type) {
    case Floating::kFloat32:
      return launch<float>(kernel::dequantize_8bit<float>, params, stream);
    case Floating::kBFloat16:
      return launch<__nv_bfloat16>(kernel::dequantize_8bit<__nv_bfloat16>, params, stream);
    case Floating::kFloat16:
      return launch<__half>(kernel::dequantize_8bit<__half>, params, stream);
  }
  return cudaErrorInvalidValue;
}

}  // namespace lora_ext::cuda
