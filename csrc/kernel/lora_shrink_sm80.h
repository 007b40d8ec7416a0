// lora_shrink on mma.sync: a block makes one tile of Z, [64, 64], from one split of k. Grid: row
// tiles, column tiles, splits.
#pragma once
#include "kernel/fragment_mask.h"
#include "kernel/lora_shrink.h"
#include "kernel/tile_copy_sm80.h"
#include "ptx/matrix_move.h"
#include "ptx/mma.h"

namespace lora_ext::kernel {

template <class T, bool kMNMajor, bool kMasked, Alignment kAlignment>
struct LoraShrinkSm80 {
  using Tile = LoraShrinkTile;
  using Copy = TileCopy<T, Tile::kThreads, kAlignment>;
  static constexpr int kColumnBlocks = Tile::kN / 8;

  const LoraShrinkParams<T>& p;
  const uint32_t shared = ptx::shared_address(ptx::dynamic_shared_memory());
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int row0 = static_cast<int>(blockIdx.x) * Tile::kM + warp * 16;
  const int first_step = static_cast<int>(blockIdx.z) * p.steps_per_split;
  const int all_steps = (p.k + Tile::kK - 1) / Tile::kK;
  const int end_step = min(first_step + p.steps_per_split, all_steps);

  __device__ __forceinline__ void load(int step) const {
    if (step < end_step) {
      const Copy copy{shared};
      const uint32_t tile =
          static_cast<uint32_t>((step - first_step) % Tile::kStages) * Tile::kStageBytes;
      const int k0 = step * Tile::kK, column0 = static_cast<int>(blockIdx.y) * Tile::kN;
      copy.template copy_tile<Tile::kM, Tile::kK>(tile, {p.x, p.x_pitch, p.m, p.k},
                                                  static_cast<int>(blockIdx.x) * Tile::kM, k0);
      if constexpr (kMNMajor) {
        copy.template copy_tile<Tile::kK, Tile::kN>(tile + Tile::kLeftBytes,
                                                    {p.a, p.a_pitch, p.k, p.columns}, k0, column0);
      } else {
        copy.template copy_tile<Tile::kN, Tile::kK>(tile + Tile::kLeftBytes,
                                                    {p.a, p.a_pitch, p.columns, p.k}, column0, k0);
      }
    }
    ptx::cp_async_commit_group();
  }

  // A fragment holds rows l / 4 and l / 4 + 8 (registers 0 and 1), columns 2 (l % 4) and the next,
  // then the same 8 columns further (2 and 3). Two fragments along k use the four words of a draw.
  struct Draws {
    philox::Words rows[2];
  };
  __device__ __forceinline__ void mask(uint32_t (&a)[4], Draws& draws, int k16, int column) const {
    const auto seed = static_cast<uint64_t>(*p.mask.seed);
    const auto row = static_cast<uint64_t>(p.mask.row_offset + row0 + lane / 4);
    const auto at = static_cast<uint64_t>(p.mask.col_offset + column + lane % 4 * 2);
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      if (p.mask.in_step()) {
        if (k16 % 2 == 0)
          draws.rows[half] = philox::draw(seed, row + half * 8, philox::group_of(at));
        keep_or_drop(a[half], draws.rows[half].w[k16 % 2 * 2], p.mask);
        keep_or_drop(a[half + 2], draws.rows[half].w[k16 % 2 * 2 + 1], p.mask);
      } else {
#pragma unroll
        for (int right = 0; right < 2; ++right) {
          const uint64_t first = at + right * 8;
          const uint32_t low = draw_for_element(seed, row + half * 8, first) & 0xFFFF;
          const uint32_t high = draw_for_element(seed, row + half * 8, first + 1) << 16;
          keep_or_drop(a[half + right * 2], low | high, p.mask);
        }
      }
    }
  }

  __device__ __forceinline__ void multiply(float (&acc)[kColumnBlocks][4], int step) const {
    const uint32_t left =
        shared + static_cast<uint32_t>((step - first_step) % Tile::kStages) * Tile::kStageBytes;
    const uint32_t right = left + Tile::kLeftBytes;
    Draws draws{};
#pragma unroll
    for (int k16 = 0; k16 < Tile::kK / 16; ++k16) {
      uint32_t a[4];
      ptx::ldmatrix_x4(a, left + row_chunk_offset(warp * 16 + lane % 16, k16 * 2 + lane / 16));
      if constexpr (kMasked) mask(a, draws, k16, step * Tile::kK + k16 * 16);
#pragma unroll
      for (int j = 0; j < kColumnBlocks; j += 2) {
        uint32_t b[4];
        if constexpr (kMNMajor) {
          ptx::ldmatrix_x4_trans(b, right + row_chunk_offset(k16 * 16 + lane % 16, j + lane / 16));
        } else {
          const int column = j * 8 + lane / 16 * 8 + lane % 8;
          ptx::ldmatrix_x4(b, right + row_chunk_offset(column, k16 * 2 + lane / 8 % 2));
        }
        ptx::mma_m16n8k16<T>(acc[j], a, {b[0], b[1]});
        ptx::mma_m16n8k16<T>(acc[j + 1], a, {b[2], b[3]});
      }
    }
  }

  __device__ __forceinline__ void store(const float (&acc)[kColumnBlocks][4]) const {
    float* z = p.z + static_cast<int64_t>(blockIdx.z) * p.m * p.columns;
#pragma unroll
    for (int j = 0; j < kColumnBlocks; ++j) {
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        const int row = row0 + e / 2 * 8 + lane / 4;
        const int column = static_cast<int>(blockIdx.y) * Tile::kN + j * 8 + lane % 4 * 2 + e % 2;
        if (row < p.m && column < p.columns)
          z[static_cast<int64_t>(row) * p.columns + column] = acc[j][e];
      }
    }
  }

  __device__ __forceinline__ void run() const {
    for (int i = 0; i < Tile::kStages - 1; ++i) load(first_step + i);
    float acc[kColumnBlocks][4];
#pragma unroll
    for (int i = 0; i < kColumnBlocks * 4; ++i) acc[i / 4][i % 4] = 0.f;
    for (int step = first_step; step < end_step; ++step) {
      ptx::cp_async_wait_group<Tile::kStages - 2>();
      __syncthreads();  // both ends of the ring
      load(step + Tile::kStages - 1);
      multiply(acc, step);
    }
    store(acc);
  }
};

template <class T, bool kMNMajor, bool kMasked, Alignment kAlignment>
__global__ void __launch_bounds__(LoraShrinkTile::kThreads)
    lora_shrink_sm80(const __grid_constant__ LoraShrinkParams<T> p) {
  LoraShrinkSm80<T, kMNMajor, kMasked, kAlignment>{p}.run();
}

}  // namespace lora_ext::kernel
