// Tensor maps of two-dimensional tiles: cuTensorMapEncodeTiled without a driver.
//
// The opaque CUtensorMap holds a TensorMap, so a kernel takes the same
// `const __grid_constant__ CUtensorMap` parameter on the host and on the device.
#pragma once

#include <cuda.h>

#include <cstdint>

#include "emulator/copies/swizzle.h"

namespace emulator {

// Row-major [height, width] elements in global memory, copied in boxes of
// [box_height, box_width] elements that lie densely (then swizzled) in shared memory.
struct TensorMap {
  uint64_t magic;
  uint8_t* base;
  uint64_t width, height;
  uint64_t pitch;  // bytes from one row to the next
  uint32_t box_width, box_height;
  uint32_t element_bytes;
  Swizzle swizzle;
  uint64_t checksum;  // of all that precedes: a map that was overwritten is not used

  uint32_t box_row_bytes() const { return box_width * element_bytes; }
  uint32_t box_bytes() const { return box_row_bytes() * box_height; }
};

// The parameters, requirements and results of cuTensorMapEncodeTiled for rank 2 without interleave.
// What CUDA accepts but this layer does not run gives CUDA_ERROR_NOT_SUPPORTED.
CUresult encode_tensor_map_tiled(CUtensorMap* map, CUtensorMapDataType type, cuuint32_t rank,
                                 void* global_address, const cuuint64_t* global_dim,
                                 const cuuint64_t* global_strides, const cuuint32_t* box_dim,
                                 const cuuint32_t* element_strides,
                                 CUtensorMapInterleave interleave, CUtensorMapSwizzle swizzle,
                                 CUtensorMapL2promotion l2_promotion,
                                 CUtensorMapFloatOOBfill out_of_bound_fill);

// Why the last encode_tensor_map_tiled of this thread failed; "" after a success.
const char* tensor_map_error();

// The contents of a map that `instruction` was given; a misuse error if it is none.
TensorMap decode_tensor_map(const CUtensorMap* map, const char* instruction);

}  // namespace emulator
