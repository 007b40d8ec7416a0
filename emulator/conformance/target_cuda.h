// The machine under the conformance cases: here a GPU. target_emulator.h has the same names for the
// execution layer.
#pragma once

#include <cuda.h>
#include <cuda_runtime.h>

#include <cstdio>
#include <cstdlib>
#include <string>
#include <utility>
#include <vector>

#include "emulator/conformance/vectors.h"

namespace conformance {

inline void require(cudaError_t status, const char* what) {
  if (status == cudaSuccess) return;
  std::fprintf(stderr, "%s: %s\n", what, cudaGetErrorString(status));
  std::exit(2);
}

template <typename T>
class DeviceArray {
 public:
  explicit DeviceArray(const std::vector<T>& values) : size_(values.size()) {
    require(cudaMalloc(&data_, size_ * sizeof(T)), "cudaMalloc");
    require(cudaMemcpy(data_, values.data(), size_ * sizeof(T), cudaMemcpyHostToDevice),
            "cudaMemcpy");
  }
  explicit DeviceArray(size_t zeros) : DeviceArray(std::vector<T>(zeros)) {}
  ~DeviceArray() { cudaFree(data_); }
  DeviceArray(const DeviceArray&) = delete;
  DeviceArray& operator=(const DeviceArray&) = delete;

  T* data() { return data_; }
  std::vector<T> to_host() const {
    std::vector<T> values(size_);
    require(cudaMemcpy(values.data(), data_, size_ * sizeof(T), cudaMemcpyDeviceToHost),
            "cudaMemcpy");
    return values;
  }

 private:
  T* data_ = nullptr;
  size_t size_;
};

struct Launch {
  uint32_t blocks, threads;
  uint32_t shared_bytes = 0;
  uint32_t cluster = 1;
  bool programmatic_dependent = false;
};

template <typename... Parameters, typename... Arguments>
void launch(const Launch& launch, void (*kernel)(Parameters...), Arguments&&... arguments) {
  if (skipping) return;
  require(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                               static_cast<int>(launch.shared_bytes)),
          "cudaFuncSetAttribute");
  cudaLaunchAttribute attributes[2] = {};
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(launch.blocks);
  config.blockDim = dim3(launch.threads);
  config.dynamicSmemBytes = launch.shared_bytes;
  config.attrs = attributes;
  if (launch.cluster > 1) {
    attributes[config.numAttrs].id = cudaLaunchAttributeClusterDimension;
    attributes[config.numAttrs].val.clusterDim = {launch.cluster, 1, 1};
    ++config.numAttrs;
  }
  if (launch.programmatic_dependent) {
    attributes[config.numAttrs].id = cudaLaunchAttributeProgrammaticStreamSerialization;
    attributes[config.numAttrs].val.programmaticStreamSerializationAllowed = 1;
    ++config.numAttrs;
  }
  require(cudaLaunchKernelEx(&config, kernel, std::forward<Arguments>(arguments)...), "launch");
}

inline void synchronize() { require(cudaDeviceSynchronize(), "kernel"); }

// The driver's function is looked up at run time, so that the driver need not be linked.
inline CUresult encode_tensor_map(CUtensorMap* map, CUtensorMapDataType type, cuuint32_t rank,
                                  void* base, const cuuint64_t* dims, const cuuint64_t* pitches,
                                  const cuuint32_t* box, const cuuint32_t* strides,
                                  CUtensorMapInterleave interleave, CUtensorMapSwizzle swizzle,
                                  CUtensorMapL2promotion promotion, CUtensorMapFloatOOBfill fill) {
  static const auto encode = [] {
    void* function = nullptr;
    cudaDriverEntryPointQueryResult found;
    require(cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &function, 12000,
                                             cudaEnableDefault, &found),
            "cuTensorMapEncodeTiled");
    return reinterpret_cast<decltype(&cuTensorMapEncodeTiled)>(function);
  }();
  return encode(map, type, rank, base, dims, pitches, box, strides, interleave, swizzle, promotion,
                fill);
}

inline void prepare(uint64_t) {}

inline cudaDeviceProp properties() {
  cudaDeviceProp found;
  require(cudaGetDeviceProperties(&found, 0), "cudaGetDeviceProperties");
  return found;
}
inline int compute_capability() { return properties().major * 10 + properties().minor; }
inline std::string producer() {
  int driver = 0;
  require(cudaDriverGetVersion(&driver), "cudaDriverGetVersion");
  return "{\"kind\": \"gpu\", \"name\": \"" + std::string(properties().name) +
         "\", \"compute_capability\": " + std::to_string(compute_capability()) +
         ", \"toolkit\": " + std::to_string(CUDART_VERSION) +
         ", \"driver\": " + std::to_string(driver) + "}";
}

}  // namespace conformance
