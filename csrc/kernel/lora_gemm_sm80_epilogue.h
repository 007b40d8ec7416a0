// From the accumulators to Y: the mask on the low-rank product, the bias, and rows that leave in
// 16-byte chunks by way of a slab of shared memory of each warp.
//
// Of each 16 x 8 block, lane l holds rows l / 4 and l / 4 + 8, columns 2 (l % 4) and the next.
#pragma once
#include "kernel/lora_gemm.h"
#include "kernel/mask.h"
#include "kernel/rounded.h"
#include "ptx/thread.h"

namespace lora_ext::kernel {

template <class T, class Tile, Alignment kAlignment, class Fault>
struct LoraGemmEpilogue {
  static constexpr int kRowBlocks = Tile::kWarpM / 16, kColumnBlocks = Tile::kWarpN / 8;
  using Accumulators = float[kRowBlocks][kColumnBlocks][4];

  const LoraGemmParams<T>& p;
  const int lane = threadIdx.x % 32;

  // mask * accumulators, which hold T U alone; the warp's tile begins at (row0, column0).
  __device__ __forceinline__ void mask(Accumulators& acc, int row0, int column0) const {
    const auto seed = static_cast<uint64_t>(*p.mask.seed);
#pragma unroll
    for (int i = 0; i < kRowBlocks; ++i) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const auto row =
            static_cast<uint64_t>(p.mask.row_offset + row0 + i * 16 + half * 8 + lane / 4);
        const int64_t column = p.mask.col_offset + column0 + lane % 4 * 2;
        if (Fault::flag("mask.in_step", p.mask.in_step())) {
          mask_in_step(acc[i], half * 2, seed, row, static_cast<uint64_t>(column));
        } else {
          mask_each(acc[i], half * 2, seed, row, static_cast<uint64_t>(column));
        }
      }
    }
  }

  __device__ __forceinline__ void keep_or_drop(float& value, uint32_t draw) const {
    value = Fault::flag("mask.kept", (draw & 0xFFFF) < p.mask.keep_count)
                ? value * p.mask.keep_scale
                : 0.f;
  }

  // Where columns count from a multiple of 32, one draw decides a lane's 8 elements of a row in
  // four blocks side by side, in the order in which the lane holds them.
  __device__ __forceinline__ void mask_in_step(float (&blocks)[kColumnBlocks][4], int first,
                                               uint64_t seed, uint64_t row, uint64_t column) const {
#pragma unroll
    for (int j = 0; j < kColumnBlocks; j += 4) {
      const philox::Words words = philox::draw(seed, row, philox::group_of(column + j * 8));
#pragma unroll
      for (int word = 0; word < 4; ++word) {
        keep_or_drop(blocks[j + word][first], words.w[word]);
        keep_or_drop(blocks[j + word][first + 1], words.w[word] >> 16);
      }
    }
  }

  // Any other offset: a draw for each element.
  __device__ __forceinline__ void mask_each(float (&blocks)[kColumnBlocks][4], int first,
                                            uint64_t seed, uint64_t row, uint64_t column) const {
#pragma unroll
    for (int j = 0; j < kColumnBlocks; ++j) {
#pragma unroll
      for (int e = 0; e < 2; ++e)
        keep_or_drop(blocks[j][first + e], draw_for_element(seed, row, column + j * 8 + e));
    }
  }

  __device__ __forceinline__ void store_chunk(const unsigned char* chunk, int row,
                                              int column) const {
    const int left = Fault::count("store.columns", p.n, p.n - 1, p.n + 1) - column;
    if (Fault::flag("store.outside",
                    row >= Fault::count("store.rows", p.m, p.m - 1, p.m + 1) || left <= 0))
      return;
    T* target = p.y + static_cast<int64_t>(row) * p.y_pitch + column;
    if (Fault::flag("store.whole_chunk", kAlignment == Alignment::kVector && left >= 8)) {
      *reinterpret_cast<uint4*>(target) = *reinterpret_cast<const uint4*>(chunk);
    } else {
#pragma unroll
      for (int i = 0; i < 8; ++i)
        if (Fault::flag("store.element", i < left))
          target[i] = reinterpret_cast<const T*>(chunk)[i];
    }
  }

  __device__ __forceinline__ float bias_of(int column) const {
    if (Fault::flag("store.no_bias", p.bias == nullptr || column >= p.n)) return 0.f;
    if (Fault::flag("store.float_bias", p.float_bias))
      return static_cast<const float*>(p.bias)[column];
    return static_cast<float>(static_cast<const T*>(p.bias)[column]);
  }

  // The warp's part of Y, 16 rows at a time.
  __device__ __forceinline__ void store(const Accumulators& acc, int row0, int column0) const {
    constexpr int kChunks = Tile::kWarpN / 8;
    unsigned char* slab = ptx::dynamic_shared_memory() + Tile::kSlabs +
                          static_cast<int>(threadIdx.x) / 32 * 16 * Tile::kSlabPitch;
#pragma unroll
    for (int i = 0; i < kRowBlocks; ++i) {
      if (!Fault::skip("store.slab_free")) __syncwarp();
#pragma unroll
      for (int j = 0; j < kColumnBlocks; ++j) {
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          const int column = column0 + j * 8 + lane % 4 * 2 + e % 2;
          const int row = e / 2 * 8 + lane / 4;
          T* pair =
              reinterpret_cast<T*>(slab + row * Tile::kSlabPitch + (j * 8 + lane % 4 * 2) * 2);
          pair[e % 2] = rounded<T>(acc[i][j][e] + bias_of(column));
        }
      }
      if (!Fault::skip("store.slab_full")) __syncwarp();
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
