// What launches need of CUDA besides launching: the types of dtypes, errors as text, and tensor
// maps of row-major matrices, which the driver encodes. device.cu defines the functions.
#pragma once
#include <cuda.h>
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>
#include <string>
#include <type_traits>

#include "common/dtype.h"

namespace lora_ext::cuda {

// Returns "" for cudaSuccess; else the runtime's message, with both versions if the driver is older
// than the runtime of this build. Clears the error: otherwise the next caller to query it, torch or
// this library, would report it for its own call.
std::string text_of(cudaError_t error);

template <class T>
constexpr Dtype kDtypeOf = Dtype::kFloat32;
template <>
inline constexpr Dtype kDtypeOf<double> = Dtype::kFloat64;
template <>
inline constexpr Dtype kDtypeOf<__nv_bfloat16> = Dtype::kBFloat16;
template <>
inline constexpr Dtype kDtypeOf<__half> = Dtype::kFloat16;
template <>
inline constexpr Dtype kDtypeOf<bool> = Dtype::kBool;

// Calls call(std::type_identity<T>()) for the one of Types that has a dtype, and returns whether
// one has.
template <class... Types, class Call>
bool with_type(Dtype dtype, const Call& call) {
  return ((kDtypeOf<Types> == dtype && (call(std::type_identity<Types>()), true)) || ...);
}

struct TensorMapKey {
  const void* data;
  CUtensorMapDataType type;
  int element_bytes;
  int rows, columns;
  int64_t pitch;  // elements
  int box_rows;
  bool operator==(const TensorMapKey&) const = default;
};

// Boxes of box_rows x 128 bytes with the 128-byte swizzle, zeros outside of the matrix. Maps are
// cached per thread by their key: a weight's is encoded once. The driver's function is looked up at
// run time, so that libcuda need not be linked.
cudaError_t tensor_map(const TensorMapKey& key, CUtensorMap* map);

// Whether the driver has the function.
bool has_tensor_maps();

}  // namespace lora_ext::cuda
