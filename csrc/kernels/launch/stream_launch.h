// Launches kernels on a stream of the current device and keeps the first error.
#pragma once
#include <cuda_runtime.h>

#include <cstdint>
#include <map>
#include <mutex>
#include <set>
#include <utility>

#include "kernels/gemm/sm90a/launch.h"
#include "kernels/launch/driver.h"
#include "kernels/tile/copy.h"

namespace lora_ext::cuda {

class StreamLaunch {
 public:
  explicit StreamLaunch(cudaStream_t stream) : stream_(stream) {}

  // With PDL, the kernel may start as soon as the one before triggers it
  // (griddepcontrol.launch_dependents).
  template <class Params>
  void operator()(void (*kernel)(Params), dim3 grid, unsigned threads, uint32_t shared_bytes,
                  const Params& params, bool use_pdl = false) {
    if (error_ == cudaSuccess)
      error_ = allow_shared(reinterpret_cast<const void*>(kernel), shared_bytes);
    if (error_ != cudaSuccess) return;
    cudaLaunchAttribute attribute = programmatic();
    cudaLaunchConfig_t launch{};
    launch.gridDim = grid, launch.blockDim = dim3(threads);
    launch.dynamicSmemBytes = shared_bytes, launch.stream = stream_;
    launch.attrs = &attribute, launch.numAttrs = use_pdl ? 1 : 0;
    error_ = cudaLaunchKernelEx(&launch, kernel, params);
  }

  void clear(uint32_t* flags, int64_t count) {
    if (error_ == cudaSuccess)
      error_ = cudaMemsetAsync(flags, 0, static_cast<size_t>(count) * sizeof *flags, stream_);
  }

  // Launches in clusters, as kernels/gemm/sm90a/launch.h describes.
  template <class... Params>
  void operator()(void (*kernel)(Params...), const kernel::Sm90aLaunch& config,
                  const Params&... params) {
    if (error_ != cudaSuccess) return;
    ClusterConfiguration configuration(config, stream_);
    error_ = cudaLaunchKernelEx(&configuration.launch, kernel, params...);
  }

  template <class T>
  CUtensorMap encode(const T* data, int rows, int columns, int64_t pitch, int box_rows) {
    using Type = kernel::Element<T>;
    CUtensorMap map{};
    if (error_ == cudaSuccess)
      error_ =
          tensor_map({data, Type::kTensorMap, Type::kBytes, rows, columns, pitch, box_rows}, &map);
    return map;
  }

  // Number of clusters resident at a time, at least 1, so that a grid is never empty. The SMs of a
  // cluster must be neighbours; only the driver knows how many such groups there are.
  //
  // Here and in allow_shared no lock is held while the driver is asked: it may load the kernel
  // then, and wait for work on the device, which may need another thread's launch on another one.
  template <class Kernel>
  int64_t clusters(Kernel kernel, const kernel::Sm90aLaunch& config) {
    static std::mutex mutex;
    static std::map<std::pair<const void*, int>, int> known;
    const auto* function = reinterpret_cast<const void*>(kernel);
    int device = 0;
    note(cudaGetDevice(&device));
    note(allow_shared(function, config.shared_bytes));
    if (error_ != cudaSuccess) return 1;
    {
      const std::lock_guard lock(mutex);
      if (const auto found = known.find({function, device}); found != known.end())
        return found->second;
    }
    int most = 0;
    ClusterConfiguration configuration(config, stream_);
    note(cudaOccupancyMaxActiveClusters(&most, function, &configuration.launch));
    if (most <= 0) return 1;
    const std::lock_guard lock(mutex);
    return known.try_emplace({function, device}, most).first->second;
  }

  cudaError_t error() const { return error_; }

 private:
  // A launch configuration points to its attributes, so both have one lifetime.
  struct ClusterConfiguration {
    cudaLaunchAttribute attributes[2] = {};
    cudaLaunchConfig_t launch = {};

    ClusterConfiguration(const kernel::Sm90aLaunch& config, cudaStream_t stream) {
      attributes[0].id = cudaLaunchAttributeClusterDimension;
      attributes[0].val.clusterDim = {config.cluster.x, config.cluster.y, config.cluster.z};
      attributes[1] = programmatic();
      launch.gridDim = config.grid, launch.blockDim = dim3(config.threads);
      launch.dynamicSmemBytes = config.shared_bytes, launch.stream = stream;
      launch.attrs = attributes, launch.numAttrs = config.dependent ? 2 : 1;
    }
    ClusterConfiguration(const ClusterConfiguration&) = delete;
    ClusterConfiguration& operator=(const ClusterConfiguration&) = delete;
  };

  static cudaLaunchAttribute programmatic() {
    cudaLaunchAttribute attribute{};
    attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
    attribute.val.programmaticStreamSerializationAllowed = 1;
    return attribute;
  }

  // More than 48 KiB of dynamic shared memory must be allowed for a kernel, once on each device.
  static cudaError_t allow_shared(const void* kernel, uint32_t shared_bytes) {
    if (shared_bytes <= 48 * 1024) return cudaSuccess;
    static std::mutex mutex;
    static std::set<std::pair<const void*, int>> allowed;
    int device = 0;
    if (const cudaError_t error = cudaGetDevice(&device); error != cudaSuccess) return error;
    {
      const std::lock_guard lock(mutex);
      if (allowed.contains({kernel, device})) return cudaSuccess;
    }
    const cudaError_t error = cudaFuncSetAttribute(
        kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(shared_bytes));
    if (error != cudaSuccess) return error;
    const std::lock_guard lock(mutex);
    allowed.insert({kernel, device});
    return cudaSuccess;
  }

  void note(cudaError_t error) {
    if (error_ == cudaSuccess) error_ = error;
  }

  cudaStream_t stream_;
  cudaError_t error_ = cudaSuccess;
};

}  // namespace lora_ext::cuda
