// dequantize_4bit: dequantises NF4 and FP4 codes, bit for bit as cpu/dequantize.h does.
//
//     out[i] = table[code i] * scale[i / block]
//     scale[b] = scale_table[code b] * scale_scale[b / scale_block] + offset      or as it is given
//
// The table is stored in the lanes of a warp, twice, and a code is looked up by a shuffle. The
// shuffle takes the lane modulo 32 itself, so the bits above the code in its word need no mask: one
// of them only selects one of the two copies. So a value takes a shift, a shuffle, a multiplication
// and half a conversion; a table in shared memory would need a mask, too, and a barrier first.
// Together with the other work of a tile this is 6.4 instructions per value on sm_80 and 6.8 on
// sm_90a: an H100 issues the instructions of 4.4e12 values per second, and moves the 2.5 bytes of
// 1.3e12 values. So codes are loaded 4 bytes at a time: a load of 16 would save 3 of 216
// instructions, and take 16 shuffles to bring the codes to the lanes that store the values.
#pragma once

#include <cstdint>
#include <type_traits>

#include "kernels/dequantize.h"
#include "kernels/dequantize/tile.h"
#include "ptx/target.h"

namespace lora_ext::kernel {

__device__ __forceinline__ float scale_of(const Dequantize4bitParams& p, int64_t block) {
  if (p.scale != nullptr) return p.scale[block];
  const float factor = p.scale_scale[block >> p.scale_block_bits];
  // Rounded twice, as in bitsandbytes: a fused multiply-add would give other bits.
  return __fadd_rn(__fmul_rn(p.scale_table[p.scale_codes[block]], factor), *p.scale_offset);
}

template <class T>
__device__ __forceinline__ void dequantize_one(const Dequantize4bitParams& p, int64_t i) {
  const uint8_t byte = p.packed[i / 2];
  const int code = i % 2 == 0 ? byte >> 4 : byte & 15;
  static_cast<T*>(p.out)[i] = dequantized<T>(p.table[code] * scale_of(p, i >> p.block_bits));
}

// Dequantises the tile of the calling warp. Each lane holds the scale of one block of the tile,
// which has at most 32: it is computed once, by three dependent loads if the scales are quantised.
template <class T>
__device__ __forceinline__ void dequantize_tile(const Dequantize4bitParams& p, int64_t first) {
  using Tile = DequantizedTile<T>;
  using Codes = std::conditional_t<Tile::kChunk == 8, uint32_t, uint16_t>;
  static_assert(Tile::kValues >> Dequantize4bitParams::kMinBlockBits <= 32);
  const auto lane = static_cast<int>(threadIdx.x) % 32;
  const auto* packed = reinterpret_cast<const Codes*>(p.packed + first / 2) + lane;
  uint32_t codes[Tile::kChunks];
#pragma unroll
  for (int j = 0; j < Tile::kChunks; ++j) codes[j] = packed[32 * j];
  const float value = p.table[lane % 16];
  const int last_block = (Tile::kValues - 1) >> p.block_bits;
  const float scale = scale_of(p, (first >> p.block_bits) + min(lane, last_block));
  T* out = static_cast<T*>(p.out) + first + lane * Tile::kChunk;
#pragma unroll
  for (int j = 0; j < Tile::kChunks; ++j) {
    const int at = (32 * j + lane) * Tile::kChunk;
    const float factor = __shfl_sync(0xFFFFFFFFu, scale, at >> p.block_bits);
    float values[Tile::kChunk];
#pragma unroll
    for (int i = 0; i < Tile::kChunk; ++i) {
      const uint32_t code = codes[j] >> (i / 2 * 8 + (1 - i % 2) * 4);
      values[i] = __shfl_sync(0xFFFFFFFFu, value, static_cast<int>(code)) * factor;
    }
    store_chunk(out + 32 * j * Tile::kChunk, values);
  }
}

template <class T>
__global__ void __launch_bounds__(kDequantizeThreads)
    dequantize_4bit(const __grid_constant__ Dequantize4bitParams p) {
  using Tile = DequantizedTile<T>;
  const int64_t first = Tile::first(), end = min(p.count, first + Tile::kValues);
  if (p.aligned && end - first == Tile::kValues) {
    dequantize_tile<T>(p, first);
  } else {
    for (int64_t i = first + threadIdx.x % 32; i < end; i += 32) dequantize_one<T>(p, i);
  }
}

}  // namespace lora_ext::kernel
