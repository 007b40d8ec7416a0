#include <cuda_runtime.h>

#include "cuda/device.h"
#include "cuda/error.h"

namespace lora_ext::cuda {
namespace {

// 12080 -> "12.8"
std::string text_of_version(int version) {
  return std::to_string(version / 1000) + "." + std::to_string(version % 1000 / 10);
}

// Returns 0 without a driver.
int driver_version() {
  int version = 0;
  if (cudaDriverGetVersion(&version) == cudaSuccess) return version;
  cudaGetLastError();
  return 0;
}

std::string too_old(int version) {
  const std::string built = text_of_version(CUDART_VERSION);
  return "older than CUDA " + built +
         ", which the kernels were built with: update the driver, or " +
         "reinstall lora_ext with a toolkit of " + text_of_version(version) + " or older";
}

}  // namespace

std::string text_of(cudaError_t error) {
  if (error == cudaSuccess) return "";
  cudaGetLastError();
  const std::string text = cudaGetErrorString(error);
  const int version = driver_version();
  if (version == 0 || version >= CUDART_VERSION) return text;
  return text + " (the driver takes CUDA " + text_of_version(version) + ", " + too_old(version) +
         ")";
}

std::string driver() {
  const int version = driver_version();
  if (version == 0) return "none";
  if (version >= CUDART_VERSION) return text_of_version(version);
  return text_of_version(version) + ", " + too_old(version);
}

}  // namespace lora_ext::cuda
