// dequantize_8bit: dequantises 8-bit codes, bit for bit as cpu/dequantize.h does.
//
//     out[n, k] = code[n, k] * (scale[n] * multiplier)
//
// Rows may be short, as where each part of a weight's row has its own scale: tiles do not depend on
// where rows begin.
#pragma once

#include <cstdint>
#include <type_traits>

#include "kernels/dequantize.h"
#include "kernels/dequantize/tile.h"
#include "ptx/target.h"

namespace lora_ext::kernel {

template <class T>
__device__ __forceinline__ void dequantize_one(const Dequantize8bitParams& p, int64_t i) {
  const float scale = p.scale[i / p.columns] * p.multiplier;
  static_cast<T*>(p.out)[i] = dequantized<T>(static_cast<float>(p.codes[i]) * scale);
}

// Dequantises the tile of the calling warp: one 64-bit division, and one 32-bit division per chunk.
template <class T>
__device__ __forceinline__ void dequantize_tile(const Dequantize8bitParams& p, int64_t first) {
  using Tile = DequantizedTile<T>;
  using Codes = std::conditional_t<Tile::kChunk == 8, uint2, uint32_t>;
  const auto lane = threadIdx.x % 32;
  const auto* packed = reinterpret_cast<const Codes*>(p.codes + first) + lane;
  Codes codes[Tile::kChunks];
#pragma unroll
  for (int j = 0; j < Tile::kChunks; ++j) codes[j] = packed[32 * j];
  const int64_t row = first / p.columns;
  // A remainder of 32 bits, as the divisor is. NOLINTNEXTLINE(custom-cut-to-32-bits)
  const auto column = static_cast<uint32_t>(first - row * p.columns);
  T* out = static_cast<T*>(p.out) + first + lane * Tile::kChunk;
#pragma unroll
  for (int j = 0; j < Tile::kChunks; ++j) {
    const uint32_t at = column + (32 * j + lane) * Tile::kChunk;
    const float scale = p.scale[row + at / p.columns] * p.multiplier;
    int8_t bytes[Tile::kChunk];
    memcpy(bytes, &codes[j], sizeof bytes);
    float values[Tile::kChunk];
#pragma unroll
    for (int i = 0; i < Tile::kChunk; ++i) values[i] = static_cast<float>(bytes[i]) * scale;
    store_chunk(out + 32 * j * Tile::kChunk, values);
  }
}

template <class T>
__global__ void __launch_bounds__(kDequantizeThreads)
    dequantize_8bit(const __grid_constant__ Dequantize8bitParams p) {
  using Tile = DequantizedTile<T>;
  const int64_t first = Tile::first(), end = min(p.count, first + Tile::kValues);
  if (p.aligned && end - first == Tile::kValues) {
    dequantize_tile<T>(p, first);
  } else {
    for (int64_t i = first + threadIdx.x % 32; i < end; i += 32) dequantize_one<T>(p, i);
  }
}

}  // namespace lora_ext::kernel
