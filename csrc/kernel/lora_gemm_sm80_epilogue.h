// From the accumulators to Y: the mask on the low-rank product, the bias, and rows that leave in
// 16-byte chunks by way of a slab of shared memory of each warp. Rows of a base come the same way.
//
// Of each 16 x 8 block, lane l holds rows l / 4 and l / 4 + 8, columns 2 (l % 4) and the next.
#pragma once
#include "kernel/accumulator_mask.h"
#include "kernel/bias.h"
#include "kernel/lora_gemm.h"
#include "kernel/rounded.h"
#include "ptx/thread.h"

namespace lora_ext::kernel {

// The row of P and Y at a position: itself.
struct SameRows {
  __device__ __forceinline__ int operator()(int position) const { return position; }
};

template <class T, class Tile, Alignment kAlignment, bool kAddsOntoBase, class Rows = SameRows>
struct LoraGemmEpilogue {
  static constexpr int kRowBlocks = Tile::kWarpM / 16, kColumnBlocks = Tile::kWarpN / 8;
  using Accumulators = float[kRowBlocks][kColumnBlocks][4];

  const LoraGemmParams<T>& p;
  const Rows row_at{};
  const int lane = threadIdx.x % 32;

  // mask * accumulators, which hold T U alone; the warp's tile begins at (row0, column0).
  __device__ __forceinline__ void mask(Accumulators& acc, int row0, int column0) const {
    const AccumulatorMask<kColumnBlocks> mask{p.mask};
#pragma unroll
    for (int i = 0; i < kRowBlocks; ++i) {
      const int row = row0 + i * 16 + lane / 4;
      mask.apply(&acc[i][0][0], row_at(row), row_at(row + 8), column0 + lane % 4 * 2);
    }
  }

  // Eight elements of a row, of which `left` are within Y.
  __device__ __forceinline__ void copy_chunk(T* to, const T* from, int left) const {
    if (kAlignment == Alignment::kVector && left >= 8) {
      *reinterpret_cast<uint4*>(to) = *reinterpret_cast<const uint4*>(from);
    } else {
#pragma unroll
      for (int i = 0; i < 8; ++i)
        if (i < left) to[i] = from[i];
    }
  }

  // move(chunk of the slab, row, column, elements of the chunk within Y) for the chunks of 16 rows.
  template <class Move>
  __device__ __forceinline__ void for_chunks(unsigned char* slab, int row0, int column0,
                                             const Move& move) const {
    constexpr int kChunks = Tile::kWarpN / 8;
#pragma unroll
    for (int chunk = 0; chunk < 16 * kChunks / 32; ++chunk) {
      const int index = chunk * 32 + lane;
      const int in_row = index / kChunks, in_column = index % kChunks * 8;
      const int row = row0 + in_row, column = column0 + in_column, left = p.n - column;
      if (row >= p.m || left <= 0) continue;
      move(reinterpret_cast<T*>(slab + in_row * Tile::kSlabPitch + in_column * 2), row_at(row),
           column, left);
    }
  }

  // The warp's part of Y, 16 rows at a time.
  __device__ __forceinline__ void store(const Accumulators& acc, int row0, int column0) const {
    const Bias<T> bias{p.bias, p.float_bias, p.n};
    unsigned char* slab = ptx::dynamic_shared_memory() + Tile::kSlabs +
                          static_cast<int>(threadIdx.x) / 32 * 16 * Tile::kSlabPitch;
#pragma unroll
    for (int i = 0; i < kRowBlocks; ++i) {
      float of_columns[kColumnBlocks][2];
      bias.load(of_columns, column0 + lane % 4 * 2);
      __syncwarp();
      const bool onto_base = kAddsOntoBase && p.base != nullptr;
      if (onto_base) {
        for_chunks(slab, row0 + i * 16, column0, [&](T* chunk, int row, int column, int left) {
          copy_chunk(chunk, p.base + static_cast<int64_t>(row) * p.base_pitch + column, left);
        });
        __syncwarp();
      }
#pragma unroll
      for (int j = 0; j < kColumnBlocks; ++j) {
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          const int row = e / 2 * 8 + lane / 4, column = j * 8 + lane % 4 * 2 + e % 2;
          T* to = reinterpret_cast<T*>(slab + row * Tile::kSlabPitch + column * 2);
          float sum = acc[i][j][e] + of_columns[j][e % 2];
          if (onto_base && row0 + i * 16 + row < p.m && column0 + column < p.n)
            sum += static_cast<float>(*to);
          *to = rounded<T>(sum);
        }
      }
      __syncwarp();
      for_chunks(slab, row0 + i * 16, column0, [&](T* chunk, int row, int column, int left) {
        copy_chunk(p.y + static_cast<int64_t>(row) * p.y_pitch + column, chunk, left);
      });
    }
  }
};

}  // namespace lora_ext::kernel
