#include <functional>
#include <unordered_map>

#include "kernels/launch/error.h"
#include "kernels/launch/tensor_map.h"

namespace lora_ext::cuda {
namespace {

using Encode = decltype(&cuTensorMapEncodeTiled);

// The oldest version of the function, from CUDA 12.0; null if the driver does not have it.
Encode find_encode() {
  void* function = nullptr;
  cudaDriverEntryPointQueryResult found = cudaDriverEntryPointSymbolNotFound;
  const cudaError_t error = cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &function,
                                                             12000, cudaEnableDefault, &found);
  const bool usable = text_of(error).empty() && found == cudaDriverEntryPointSuccess;
  return usable ? reinterpret_cast<Encode>(function) : nullptr;
}

Encode encode_function() {
  static const Encode found = find_encode();
  return found;
}

cudaError_t encode(const TensorMapKey& key, CUtensorMap* map) {
  const Encode encode_tiled = encode_function();
  if (encode_tiled == nullptr) return cudaErrorNotSupported;
  const cuuint64_t dimensions[] = {static_cast<cuuint64_t>(key.columns),
                                   static_cast<cuuint64_t>(key.rows)};
  const cuuint64_t strides[] = {static_cast<cuuint64_t>(key.pitch) * 2};
  const cuuint32_t box[] = {64, static_cast<cuuint32_t>(key.box_rows)}, element_strides[] = {1, 1};
  const CUresult result =
      encode_tiled(map, key.type, 2, const_cast<void*>(key.data), dimensions, strides, box,
                   element_strides, CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B,
                   CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  return result == CUDA_SUCCESS ? cudaSuccess : cudaErrorInvalidValue;
}

struct Hash {
  size_t operator()(const TensorMapKey& key) const {
    size_t hash = std::hash<const void*>()(key.data);
    for (const int64_t part : {int64_t{key.rows}, int64_t{key.columns}, key.pitch,
                               int64_t{key.box_rows}, int64_t{key.type}})
      hash = hash * 0x9E3779B97F4A7C15ull + std::hash<int64_t>()(part);
    return hash;
  }
};

}  // namespace

bool has_tensor_maps() { return encode_function() != nullptr; }

cudaError_t tensor_map(const TensorMapKey& key, CUtensorMap* map) {
  constexpr size_t kMax = 4096;  // 700 KiB; a limit, since activations keep getting new addresses
  thread_local std::unordered_map<TensorMapKey, CUtensorMap, Hash> kept;
  if (const auto known = kept.find(key); known != kept.end()) {
    *map = known->second;
    return cudaSuccess;
  }
  const cudaError_t error = encode(key, map);
  if (error != cudaSuccess) return error;
  if (kept.size() == kMax) kept.clear();
  kept.emplace(key, *map);
  return cudaSuccess;
}

}  // namespace lora_ext::cuda
