// The dequantisation kernel of each format, and the tile of a warp and its stores, which they
// share.
//
// A format has here its dequantize_tile, dequantize_one and kernel, and a dequantize_kernel, which
// finds the kernel of its parameters; those are in kernels/dequantize.h. Grid: (blocks, matrices).
//
// A warp writes kChunks times 512 consecutive bytes, 16 per lane: every store of a warp fills whole
// sectors. The loads of codes, kChunks of them in flight, are consecutive, too.
#pragma once
#include <cstdint>
#include <type_traits>

#include "kernels/dequantize.h"
#include "kernels/tile/expert_rows.h"
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

  // The first value of the calling warp, within its matrix.
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

// What the calling warp has of the matrix of blockIdx.y; of an expert without rows nothing is read
// and nothing written.
template <class T, class Params>
__device__ __forceinline__ void dequantize_matrix(const Params& p) {
  using Tile = DequantizedTile<T>;
  const auto matrix = static_cast<int>(blockIdx.y);
  if (!has_rows(p.offs, p.first + matrix)) return;
  const int64_t before = matrix * p.count, first = before + Tile::first();
  const int64_t end = min(before + p.count, first + Tile::kValues);
  if (p.aligned && end - first == Tile::kValues) {
    dequantize_tile<T>(p, first);
  } else {
    for (int64_t i = first + threadIdx.x % 32; i < end; i += 32) dequantize_one<T>(p, i);
  }
}

// dequantize_4bit: dequantises codes of NF4, FP4 and e2m1, bit for bit as cpu/dequantize.h does.
//
//     out[i] = table[code i] * scale[i / block]
//     scale[b] = scale_table[code b] * scale_scale[b / scale_block] + offset      or as it is given
//
// The table is stored in the lanes of a warp, twice, and a code is looked up by a shuffle. The
// shuffle takes the lane modulo 32 itself, so the bits above the code in its word need no mask: one
// of them only selects one of the two copies. So a value takes a shift, a shuffle, a multiplication
// and half a conversion; a table in shared memory would need a mask, too, and a barrier first.
// Together with the other work of a tile this is 7.2 instructions per value on sm_80 and 7.5 on
// sm_90a, as `make sass` counts: an H100 issues those of 3.9e12 values per second, and moves the 2.5
// bytes of 1.3e12 values. So codes are loaded 4 bytes at a time: a load of 16 would save 3 of 230
// instructions, and take 16 shuffles to bring the codes to the lanes that store the values.

__device__ __forceinline__ float scale_of(const Dequantize4bitParams& p, int64_t block) {
  if (p.scale != nullptr) return p.scale[block];
  const float factor = p.scale_scale[block >> p.scale_block_bits];
  // Rounded twice, as in bitsandbytes: a fused multiply-add would give other bits.
  return __fadd_rn(__fmul_rn(p.scale_table[p.scale_codes[block]], factor), *p.scale_offset);
}

template <class T>
__device__ __forceinline__ void dequantize_one(const Dequantize4bitParams& p, int64_t i) {
  const uint8_t byte = p.packed[i / 2];
  const int code = (i % 2 == 0) == p.low_first ? byte & 15 : byte >> 4;
  static_cast<T*>(p.out)[i] = dequantized<T>(p.table[code] * scale_of(p, i >> p.block_bits));
}

// Codes of which the first of each byte is in the upper half.
__device__ __forceinline__ uint32_t upper_first(uint32_t codes, bool low_first) {
  return low_first ? (codes & 0x0F0F0F0Fu) << 4 | (codes >> 4 & 0x0F0F0F0Fu) : codes;
}

// Dequantises the tile of the calling warp. Each lane holds the scale of one block of the tile, and
// of a second where blocks of 16 are 64: it is computed once, by three dependent loads if the scales
// are quantised.
template <class T>
__device__ __forceinline__ void dequantize_tile(const Dequantize4bitParams& p, int64_t first) {
  using Tile = DequantizedTile<T>;
  using Codes = std::conditional_t<Tile::kChunk == 8, uint32_t, uint16_t>;
  constexpr int kMostBlocks = Tile::kValues >> Dequantize4bitParams::kMinBlockBits;
  static_assert(kMostBlocks <= 64);
  const auto lane = static_cast<int>(threadIdx.x) % 32;
  const auto* packed = reinterpret_cast<const Codes*>(p.packed + first / 2) + lane;
  uint32_t codes[Tile::kChunks];
#pragma unroll
  for (int j = 0; j < Tile::kChunks; ++j) codes[j] = upper_first(packed[32 * j], p.low_first);
  const float value = p.table[lane % 16];
  const int last_block = (Tile::kValues - 1) >> p.block_bits;
  const float scale = scale_of(p, (first >> p.block_bits) + min(lane, last_block));
  float upper = scale;  // of blocks from 32 on; the shuffle takes their numbers modulo 32
  if (kMostBlocks > 32 && last_block >= 32) {
    upper = scale_of(p, (first >> p.block_bits) + 32 + lane);
  }
  T* out = static_cast<T*>(p.out) + first + lane * Tile::kChunk;
#pragma unroll
  for (int j = 0; j < Tile::kChunks; ++j) {
    const int at = (32 * j + lane) * Tile::kChunk;
    const float held = j < Tile::kChunks / 2 ? scale : upper;
    const float factor = __shfl_sync(0xFFFFFFFFu, held, at >> p.block_bits);
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
  dequantize_matrix<T>(p);
}

template <class T>
auto dequantize_kernel(const Dequantize4bitParams&) {
  return dequantize_4bit<T>;
}

// dequantize_8bit: dequantises 8-bit codes, bit for bit as cpu/dequantize.h does.
//
//     out[r, c] = code[r, c] * (scale[r / m, c / n] * multiplier)      int8, e4m3
//
// Rows may be short, as where each part of a weight's row has its own scale: tiles do not depend on
// where rows begin.

// The values of four codes. e4m3 is read as a half, whose exponent has one bit more and a bias larger
// by 8: subnormal codes are subnormal halves, and a product by 2^8 is exact. 0x7F, which would be
// 480, becomes NaN by one more bit of the exponent.
template <class Params>
__device__ __forceinline__ void values_of(uint32_t codes, float (&values)[4]) {
  if constexpr (Params::kIsFloat8) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {  // codes i and i + 2, in the upper byte of a half each
      const uint32_t apart = i == 0 ? codes << 8 : codes;
      const uint32_t magnitude = apart >> 1 & 0x3F803F80u;
      const uint32_t nan = (magnitude + 0x00800080u) & 0x40004000u;
      const uint32_t bits = (apart & 0x80008000u) | magnitude | nan;
      __half halves[2];
      memcpy(static_cast<void*>(halves), &bits, sizeof bits);
      values[i] = __half2float(halves[0]) * 256.f;
      values[i + 2] = __half2float(halves[1]) * 256.f;
    }
  } else {
    int8_t bytes[4];
    memcpy(bytes, &codes, sizeof bytes);
#pragma unroll
    for (int i = 0; i < 4; ++i) values[i] = bytes[i];
  }
}

// The number of a row of all matrices within its own, which has fewer than 2^31.
__device__ __forceinline__ uint32_t row_of_matrix(const Dequantize8bitParams& p, int64_t row) {
  // NOLINTNEXTLINE(custom-cut-to-32-bits)
  return static_cast<uint32_t>(row - static_cast<int>(blockIdx.y) * p.rows);
}

// Of a row of a matrix, and a column.
__device__ __forceinline__ float scale_of(const Dequantize8bitParams& p, uint32_t row,
                                          uint32_t column) {
  const float* scale = p.scale + static_cast<int>(blockIdx.y) * p.scales;
  const auto block = static_cast<uint64_t>(row >> p.row_bits) * p.scale_columns;
  return scale[block + (column >> p.column_bits)] * p.multiplier;
}

template <class T, class Params>
__device__ __forceinline__ void dequantize_one(const Params& p, int64_t i) {
  const int64_t row = i / p.columns;
  // A remainder of 32 bits, as the divisor is. NOLINTNEXTLINE(custom-cut-to-32-bits)
  const auto column = static_cast<uint32_t>(i - row * p.columns);
  const float scale = scale_of(p, row_of_matrix(p, row), column);
  float values[4];
  values_of<Params>(static_cast<const uint8_t*>(p.codes)[i], values);
  static_cast<T*>(p.out)[i] = dequantized<T>(values[0] * scale);
}

// Dequantises the tile of the calling warp: one 64-bit division, and one 32-bit division per chunk.
template <class T, class Params>
__device__ __forceinline__ void dequantize_tile(const Params& p, int64_t first) {
  using Tile = DequantizedTile<T>;
  using Codes = std::conditional_t<Tile::kChunk == 8, uint2, uint32_t>;
  const auto lane = threadIdx.x % 32;
  const auto* begin = static_cast<const uint8_t*>(p.codes) + first;
  const auto* packed = reinterpret_cast<const Codes*>(begin) + lane;
  Codes codes[Tile::kChunks];
#pragma unroll
  for (int j = 0; j < Tile::kChunks; ++j) codes[j] = packed[32 * j];
  const int64_t row = first / p.columns;
  // A remainder of 32 bits, as the divisor is. NOLINTNEXTLINE(custom-cut-to-32-bits)
  const auto column = static_cast<uint32_t>(first - row * p.columns);
  const uint32_t first_row = row_of_matrix(p, row);
  T* out = static_cast<T*>(p.out) + first + lane * Tile::kChunk;
#pragma unroll
  for (int j = 0; j < Tile::kChunks; ++j) {
    const uint32_t at = column + (32 * j + lane) * Tile::kChunk, rows = at / p.columns;
    const float scale = scale_of(p, first_row + rows, at - rows * p.columns);
    uint32_t words[Tile::kChunk / 4];
    memcpy(words, &codes[j], sizeof words);
    float values[Tile::kChunk];
#pragma unroll
    for (int word = 0; word < Tile::kChunk / 4; ++word) {
      float four[4];
      values_of<Params>(words[word], four);
#pragma unroll
      for (int i = 0; i < 4; ++i) values[4 * word + i] = four[i] * scale;
    }
    store_chunk(out + 32 * j * Tile::kChunk, values);
  }
}

template <class T, class Params>
__global__ void __launch_bounds__(kDequantizeThreads)
    dequantize_8bit(const __grid_constant__ Params p) {
  dequantize_matrix<T>(p);
}

template <class T, class Params>
auto dequantize_kernel(const Params&) {
  return dequantize_8bit<T, Params>;
}

}  // namespace lora_ext::kernel
