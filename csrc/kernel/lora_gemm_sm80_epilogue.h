// From the accumulators to Y: the mask on the low-rank product, the bias, and rows that leave in
// 16-byte chunks by way of a slab of shared memory of each warp.
//
// Of each 16 x 8 block, lane l holds rows l / 4 and l / 4 + 8, columns 2 (l % 4) and the next.
#pragma once
#include "kernel/accumulator_mask.h"
#include "kernel/bias.h"
#include "kernel/lora_gemm.h"
#include "kernel/rounded.h"
#include "ptx/thread.h"

namespace lora_ext::kernel {

template <class T, class Tile, Alignment kAlignment>
struct LoraGemmEpilogue {
  static constexpr int kRowBlocks = Tile::kWarpM / 16, kColumnBlocks = Tile::kWarpN / 8;
  using Accumulators = float[kRowBlocks][kColumnBlocks][4];

  const LoraGemmParams<T>& p;
  const int lane = threadIdx.x % 32;

  // mask * accumulators, which hold T U alone; the warp's tile begins at (row0, column0).
  __device__ __forceinline__ void mask(Accumulators& acc, int row0, int column0) const {
    const AccumulatorMask<kColumnBlocks> mask{p.mask};
#pragma unroll
    for (int i = 0; i < kRowBlocks; ++i)
      mask.apply(&acc[i][0][0], row0 + i * 16 + lane / 4, column0 + lane % 4 * 2);
  }

  __device__ __forceinline__ void store_chunk(const unsigned char* chunk, int row,
                                              int column) const {
    const int left = p.n - column;
    if (row >= p.m || left <= 0) return;
    T* target = p.y + static_cast<int64_t>(row) * p.y_pitch + column;
    if (kAlignment == Alignment::kVector && left >= 8) {
      *reinterpret_cast<uint4*>(target) = *reinterpret_cast<const uint4*>(chunk);
    } else {
#pragma unroll
      for (int i = 0; i < 8; ++i)
        if (i < left) target[i] = reinterpret_cast<const T*>(chunk)[i];
    }
  }

  // The warp's part of Y, 16 rows at a time.
  __device__ __forceinline__ void store(const Accumulators& acc, int row0, int column0) const {
    constexpr int kChunks = Tile::kWarpN / 8;
    const Bias<T> bias{p.bias, p.float_bias, p.n};
    unsigned char* slab = ptx::dynamic_shared_memory() + Tile::kSlabs +
                          static_cast<int>(threadIdx.x) / 32 * 16 * Tile::kSlabPitch;
#pragma unroll
    for (int i = 0; i < kRowBlocks; ++i) {
      float of_columns[kColumnBlocks][2];
      bias.load(of_columns, column0 + lane % 4 * 2);
      __syncwarp();
#pragma unroll
      for (int j = 0; j < kColumnBlocks; ++j) {
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          const int row = e / 2 * 8 + lane / 4;
          T* pair =
              reinterpret_cast<T*>(slab + row * Tile::kSlabPitch + (j * 8 + lane % 4 * 2) * 2);
          pair[e % 2] = rounded<T>(acc[i][j][e] + of_columns[j][e % 2]);
        }
      }
      __syncwarp();
#pragma unroll
      for (int chunk = 0; chunk < 16 * kChunks / 32; ++chunk) {
        const int index = chunk * 32 + lane;
        const int row = index / kChunks, column = index % kChunks * 8;
        store_chunk(slab + row * Tile::kSlabPitch + column * 2, row0 + i * 16 + row,
                    column0 + column);
      }
    }
  }
};

}  // namespace lora_ext::kernel
