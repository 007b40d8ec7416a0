// Common to the dequantisation kernels: the tile of each warp, and the stores.
//
// A warp writes kChunks times 512 consecutive bytes, 16 per lane: every store of a warp fills whole
// sectors. The loads of codes, kChunks of them in flight, are consecutive, too.
#pragma once

#include <cstdint>

#include "kernels/tile/halves.h"
#include "ptx/target.h"

namespace lora_ext::kernel {

constexpr int kDequantizeThreads = 256;

template <class T>
struct DequantizedTile {
  static constexpr int kChunk = sizeof(T) == 4 ? 4 : 8;  // values in the 16 bytes a lane stores
  static constexpr int kChunks = 4;
  static constexpr int kValues = kChunks * 32 * kChunk;  // per warp
  static constexpr int kBlockValues = kDequantizeThreads / 32 * kValues;

  // The first value of the calling warp.
  static __device__ __forceinline__ int64_t first() {
    const auto warp = static_cast<int>(threadIdx.x) / 32;
    return static_cast<int64_t>(blockIdx.x) * kBlockValues + warp * kValues;
  }
};

template <class T>
__device__ __forceinline__ T dequantized(float value) {
  if constexpr (std::is_same_v<T, float>) {
    return value;
  } else {
    return rounded<T>(value);
  }
}

template <class T>
__device__ __forceinline__ void store_chunk(T* out, const float (&v)[DequantizedTile<T>::kChunk]) {
  uint4 chunk;
  if constexpr (std::is_same_v<T, float>) {
    memcpy(&chunk, v, sizeof chunk);
  } else {
    chunk.x = rounded_pair<T>(v[0], v[1]), chunk.y = rounded_pair<T>(v[2], v[3]);
    chunk.z = rounded_pair<T>(v[4], v[5]), chunk.w = rounded_pair<T>(v[6], v[7]);
  }
  *reinterpret_cast<uint4*>(out) = chunk;
}

}  // namespace lora_ext::kernel
