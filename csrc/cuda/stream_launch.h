// Launches kernels on a stream and keeps the first error.
#pragma once
#include <cuda_runtime.h>

#include <cstdint>
#include <mutex>
#include <set>
#include <utility>

#include "cuda/lora_gemm_sm90a.h"

namespace lora_ext::cuda {

class StreamLaunch {
 public:
  explicit StreamLaunch(cudaStream_t stream) : stream_(stream) {}

  // Early: the kernel may start as soon as the one before it lets it
  // (griddepcontrol.launch_dependents).
  template <class Params>
  void operator()(void (*kernel)(Params), dim3 grid, unsigned threads, uint32_t shared_bytes,
                  const Params& params, bool early = false) {
    if (error_ == cudaSuccess)
      error_ = allow_shared(reinterpret_cast<const void*>(kernel), shared_bytes);
    if (error_ != cudaSuccess) return;
    cudaLaunchAttribute attribute = programmatic();
    cudaLaunchConfig_t launch{};
    launch.gridDim = grid, launch.blockDim = dim3(threads);
    launch.dynamicSmemBytes = shared_bytes, launch.stream = stream_;
    launch.attrs = &attribute, launch.numAttrs = early ? 1 : 0;
    error_ = cudaLaunchKernelEx(&launch, kernel, params);
  }

  template <class T>
  void lora_gemm_sm90a(const kernel::LoraGemmParams<T>& params, const kernel::Sm90aChoice& choice) {
    if (error_ == cudaSuccess) error_ = cuda::lora_gemm_sm90a(params, choice, stream_);
  }

  template <class T>
  void lora_gemm_in_grid_sm90a(const kernel::LoraGemmParams<T>& params,
                               const kernel::LoraInGridParams<T>& in,
                               const kernel::InGridFactor<T>& factor,
                               const kernel::Sm90aChoice& choice) {
    if (error_ == cudaSuccess)
      error_ = cuda::lora_gemm_in_grid_sm90a(params, in, factor, choice, stream_);
  }

  void clear(uint32_t* flags, int64_t count) {
    if (error_ == cudaSuccess)
      error_ = cudaMemsetAsync(flags, 0, static_cast<size_t>(count) * sizeof *flags, stream_);
  }

  cudaError_t error() const { return error_; }

  static cudaLaunchAttribute programmatic() {
    cudaLaunchAttribute attribute{};
    attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
    attribute.val.programmaticStreamSerializationAllowed = 1;
    return attribute;
  }

  // Above 48 KiB a kernel must be allowed its dynamic shared memory, once on each device.
  static cudaError_t allow_shared(const void* kernel, uint32_t shared_bytes) {
    if (shared_bytes <= 48 * 1024) return cudaSuccess;
    static std::mutex mutex;
    static std::set<std::pair<const void*, int>> allowed;
    int device = 0;
    if (const cudaError_t error = cudaGetDevice(&device); error != cudaSuccess) return error;
    const std::lock_guard lock(mutex);
    if (allowed.contains({kernel, device})) return cudaSuccess;
    const cudaError_t error = cudaFuncSetAttribute(
        kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(shared_bytes));
    if (error == cudaSuccess) allowed.insert({kernel, device});
    return error;
  }

 private:
  cudaStream_t stream_;
  cudaError_t error_ = cudaSuccess;
};

}  // namespace lora_ext::cuda
