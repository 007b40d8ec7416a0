// Launches lora_gemm_sm90a in clusters on a stream, and keeps the first error.
#pragma once
#include <map>

#include "cuda/stream_launch.h"
#include "cuda/tensor_map.h"
#include "kernel/lora_gemm_sm90a_launch.h"

namespace lora_ext::cuda {

class ClusterLaunch {
 public:
  explicit ClusterLaunch(cudaStream_t stream) : stream_(stream) {}

  template <class T>
  CUtensorMap encode(const T* data, int rows, int columns, int64_t pitch, int box_rows) {
    constexpr CUtensorMapDataType kType = std::is_same_v<T, __half>
                                              ? CU_TENSOR_MAP_DATA_TYPE_FLOAT16
                                              : CU_TENSOR_MAP_DATA_TYPE_BFLOAT16;
    CUtensorMap map{};
    if (error_ == cudaSuccess)
      error_ = tensor_map({data, kType, rows, columns, pitch, box_rows}, &map);
    return map;
  }

  // At least 1, so that a grid is never empty; clusters of a block need neighbouring SMs, of which
  // the driver knows how many there are.
  template <class Kernel>
  int64_t clusters(Kernel kernel, const kernel::Sm90aLaunch& how) {
    static std::mutex mutex;
    static std::map<std::pair<const void*, int>, int> known;
    const auto* function = reinterpret_cast<const void*>(kernel);
    int device = 0;
    note(cudaGetDevice(&device));
    note(StreamLaunch::allow_shared(function, how.shared_bytes));
    if (error_ != cudaSuccess) return 1;
    const std::lock_guard lock(mutex);
    int& most = known[{function, device}];
    if (most == 0) {
      Configuration configuration(how, stream_);
      note(cudaOccupancyMaxActiveClusters(&most, function, &configuration.launch));
    }
    return most > 0 ? most : 1;
  }

  template <class... Params>
  void operator()(void (*kernel)(Params...), const kernel::Sm90aLaunch& how,
                  const Params&... params) {
    if (error_ != cudaSuccess) return;
    Configuration configuration(how, stream_);
    error_ = cudaLaunchKernelEx(&configuration.launch, kernel, params...);
  }

  cudaError_t error() const { return error_; }

 private:
  // A launch configuration points to its attributes.
  struct Configuration {
    cudaLaunchAttribute attributes[2] = {};
    cudaLaunchConfig_t launch = {};

    Configuration(const kernel::Sm90aLaunch& how, cudaStream_t stream) {
      attributes[0].id = cudaLaunchAttributeClusterDimension;
      attributes[0].val.clusterDim = {how.cluster.x, how.cluster.y, how.cluster.z};
      attributes[1] = StreamLaunch::programmatic();
      launch.gridDim = how.grid, launch.blockDim = dim3(how.threads);
      launch.dynamicSmemBytes = how.shared_bytes, launch.stream = stream;
      launch.attrs = attributes, launch.numAttrs = how.dependent ? 2 : 1;
    }
    Configuration(const Configuration&) = delete;
    Configuration& operator=(const Configuration&) = delete;
  };

  void note(cudaError_t error) {
    if (error_ == cudaSuccess) error_ = error;
  }

  cudaStream_t stream_;
  cudaError_t error_ = cudaSuccess;
};

}  // namespace lora_ext::cuda
