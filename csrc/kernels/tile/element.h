// What copies know of the type of their elements. There are no others than these.
#pragma once
#include <cuda.h>
#include <cuda_bf16.h>
#include <cuda_fp16.h>

namespace lora_ext::kernel {

template <class T, CUtensorMapDataType kType>
struct ElementOf {
  static constexpr int kBytes = sizeof(T);
  static constexpr int kChunk = 16 / kBytes;  // elements of a chunk
  static constexpr CUtensorMapDataType kTensorMap = kType;
};

template <class T>
struct Element;
template <>
struct Element<__nv_bfloat16> : ElementOf<__nv_bfloat16, CU_TENSOR_MAP_DATA_TYPE_BFLOAT16> {};
template <>
struct Element<__half> : ElementOf<__half, CU_TENSOR_MAP_DATA_TYPE_FLOAT16> {};

}  // namespace lora_ext::kernel
