// The tensor maps of csrc/cuda/tensor_map.h, encoded by the execution layer.
#pragma once
#include <stdexcept>
#include <type_traits>

#include "emulator/emulator.h"

namespace kernels {

template <class T>
CUtensorMap tensor_map(const T* data, int rows, int columns, int64_t pitch, int box_rows) {
  CUtensorMap map;
  const cuuint64_t dimensions[] = {static_cast<cuuint64_t>(columns), static_cast<cuuint64_t>(rows)};
  const cuuint64_t strides[] = {static_cast<cuuint64_t>(pitch) * sizeof(T)};
  const cuuint32_t box[] = {64, static_cast<cuuint32_t>(box_rows)}, element_strides[] = {1, 1};
  const CUtensorMapDataType type = std::is_same_v<T, __half> ? CU_TENSOR_MAP_DATA_TYPE_FLOAT16
                                                             : CU_TENSOR_MAP_DATA_TYPE_BFLOAT16;
  const CUresult result = emulator::encode_tensor_map_tiled(
      &map, type, 2, const_cast<T*>(data), dimensions, strides, box, element_strides,
      CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B, CU_TENSOR_MAP_L2_PROMOTION_NONE,
      CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  if (result != CUDA_SUCCESS) throw std::runtime_error(emulator::tensor_map_error());
  return map;
}

}  // namespace kernels
