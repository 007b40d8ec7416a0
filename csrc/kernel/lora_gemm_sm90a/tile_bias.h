// The bias of a tile's columns in lora_gemm on sm_90a: loaded into shared memory as floats before
// the last of the tile's products have ended, so that the epilogue waits for no load. Each consumer
// has its own row of it, since they may be at different tiles.
#pragma once
#include <cstring>

#include "kernel/lora_gemm_sm90a/pipeline.h"

namespace lora_ext::kernel {

template <class T, class Tile>
struct LoraGemmSm90aBias {
  static constexpr int kEach = Tile::kBiasColumns / Tile::kWarpgroup;  // per thread

  // The bias of columns `thread`, thread + kWarpgroup, ...: raw bits as loaded, since a conversion
  // would wait for the load to end.
  struct Loaded {
    uint32_t bits[kEach];
  };

  const LoraGemmParams<T>& p;
  const int consumer, thread;

  __device__ __forceinline__ bool given() const { return p.bias != nullptr; }

  // Loads the bias of the tile that begins at `column`; zero past the last column.
  __device__ __forceinline__ Loaded load(int column) const {
    Loaded loaded{};
    if (given()) {
#pragma unroll
      for (int i = 0; i < kEach; ++i) {
        const int at = column + thread + i * Tile::kWarpgroup;
        if (at < p.n) loaded.bits[i] = bits_at(at);
      }
    }
    return loaded;
  }

  // Called after a barrier that ends all reads of the row of the tile before, and followed by one.
  __device__ __forceinline__ void put(const Loaded& loaded) const {
#pragma unroll
    for (int i = 0; i < kEach; ++i) row()[thread + i * Tile::kWarpgroup] = value_of(loaded.bits[i]);
  }

  // Returns the bias of two neighbouring columns of the tile.
  __device__ __forceinline__ float2 pair(int column) const {
    return *reinterpret_cast<const float2*>(row() + column);
  }

  __device__ __forceinline__ float* row() const {
    unsigned char* rows = ptx::dynamic_shared_memory() + Tile::kBias;
    return reinterpret_cast<float*>(rows) + static_cast<size_t>(consumer) * Tile::kBiasColumns;
  }

  __device__ __forceinline__ uint32_t bits_at(int column) const {
    uint32_t bits = 0;
    if (p.float_bias) {
      const float value = static_cast<const float*>(p.bias)[column];
      memcpy(&bits, &value, sizeof value);
    } else {
      const T value = static_cast<const T*>(p.bias)[column];
      memcpy(&bits, &value, sizeof value);  // the low half: the device is little-endian
    }
    return bits;
  }

  __device__ __forceinline__ float value_of(uint32_t bits) const {
    float value;
    T half;
    memcpy(&value, &bits, sizeof value);
    memcpy(static_cast<void*>(&half), &bits, sizeof half);
    return p.float_bias ? value : static_cast<float>(half);
  }
};

}  // namespace lora_ext::kernel
