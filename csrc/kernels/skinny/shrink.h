// lora_shrink: the skinny product of the LoRA linear, split along k. skinny/elementwise.h sums the
// splits.
//
//     forward   Z[split] = drop(X) A^T     over the split's range of k       [m, columns]
//     dS        Z[split] = dY B            over the split's range of n
//
// The right operand is K-major, [columns, k] (forward: A), or MN-major, [k, columns] (dS: B). With
// fp32 adapters its hi and lo halves are stored one after the other along `columns`.
#pragma once
#include <cstdint>

#include "kernels/gemm/params.h"
#include "kernels/tile/copy.h"
#include "kernels/tile/mask.h"
#include "ptx/mma.h"

namespace lora_ext::kernel {

template <class T>
struct LoraShrinkParams {
  const T* x;  // [m, k]
  const T* a;  // [columns, k] or [k, columns]
  float* z;    // [splits, m, columns]
  int64_t x_pitch, a_pitch;
  int m, k, columns;
  int steps_per_split;  // of 64 along k
  Mask mask;            // of X; only for masked kernels
};

// 64 rows of X; four warps of 16 rows each. X is read once for every 64 columns. Three stages, 48
// KiB: three blocks per SM of sm_80, two per SM of sm_86.
using LoraShrinkTile = LoraGemmTile<64, 64, 16, 64, 3>;

// lora_shrink on mma.sync: a block computes one tile of Z, [64, 64], from one split of k. Grid: row
// tiles, column tiles, splits.

// Computes a 64 x 64 tile of Z from stages of X and A, one after the other.
template <class T, bool kMNMajor, bool kMasked>
struct LoraShrinkProduct {
  using Tile = LoraShrinkTile;
  static constexpr int kColumnBlocks = Tile::kN / 8;
  using Accumulators = float[kColumnBlocks][4];

  const Mask& dropout;
  const int rows[2];  // of X, held by this lane in each fragment
  const uint64_t seed = kMasked ? static_cast<uint64_t>(*dropout.seed) : 0;  // once for all steps
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;

  __device__ __forceinline__ static void clear(Accumulators& acc) {
#pragma unroll
    for (int i = 0; i < kColumnBlocks * 4; ++i) acc[i / 4][i % 4] = 0.f;
  }

  // A fragment holds rows l / 4 and l / 4 + 8 (registers 0 and 1), columns 2 (l % 4) and 2 (l % 4)
  // + 1, and the same 8 columns further (registers 2 and 3). Two fragments along k use the four
  // words of a draw.
  struct Draws {
    philox::Words rows[2];
  };
  __device__ __forceinline__ void mask(uint32_t (&a)[4], Draws& draws, int k16, int column) const {
    const auto at = static_cast<uint64_t>(dropout.col_offset + column + lane % 4 * 2);
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const auto row = static_cast<uint64_t>(dropout.row_offset + rows[half]);
      if (dropout.aligned_to_draws()) {
        // By C++'s products: ptxas takes those of the row out of the loop, which it does not with
        // draw_words (46 and 50 instructions a draw).
        if (k16 % 2 == 0) draws.rows[half] = philox::draw(seed, row, philox::group_of(at));
        keep_or_drop(a[half], draws.rows[half].w[k16 % 2 * 2], dropout);
        keep_or_drop(a[half + 2], draws.rows[half].w[k16 % 2 * 2 + 1], dropout);
      } else {
#pragma unroll
        for (int right = 0; right < 2; ++right) {
          const uint64_t first = at + right * 8;
          const uint32_t low = draw_for_element(seed, row, first) & 0xFFFF;
          const uint32_t high = draw_for_element(seed, row, first + 1) << 16;
          keep_or_drop(a[half + right * 2], low | high, dropout);
        }
      }
    }
  }

  // Multiplies a stage, whose columns of X begin at `column`.
  __device__ __forceinline__ void multiply(Accumulators& acc, uint32_t left, int column) const {
    const uint32_t right = left + Tile::kLeftBytes;
    Draws draws{};
#pragma unroll
    for (int k16 = 0; k16 < Tile::kK / 16; ++k16) {
      uint32_t a[4];
      ptx::ldmatrix_x4(a, left + row_chunk_offset(warp * 16 + lane % 16, k16 * 2 + lane / 16));
      if constexpr (kMasked) mask(a, draws, k16, column + k16 * 16);
#pragma unroll
      for (int j = 0; j < kColumnBlocks; j += 2) {
        uint32_t b[4];
        if constexpr (kMNMajor) {
          ptx::ldmatrix_x4_trans(b, right + row_chunk_offset(k16 * 16 + lane % 16, j + lane / 16));
        } else {
          const int row = j * 8 + lane / 16 * 8 + lane % 8;
          ptx::ldmatrix_x4(b, right + row_chunk_offset(row, k16 * 2 + lane / 8 % 2));
        }
        ptx::mma_m16n8k16<T>(acc[j], a, {b[0], b[1]});
        ptx::mma_m16n8k16<T>(acc[j + 1], a, {b[2], b[3]});
      }
    }
  }
};

template <class T, bool kMNMajor, bool kMasked, Alignment kAlignment>
struct LoraShrinkSm80 {
  using Tile = LoraShrinkTile;
  using Copy = TileCopy<T, Tile::kThreads, kAlignment>;
  using Product = LoraShrinkProduct<T, kMNMajor, kMasked>;

  const LoraShrinkParams<T>& p;
  const uint32_t shared = ptx::shared_address(ptx::dynamic_shared_memory());
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int row0 = static_cast<int>(blockIdx.x) * Tile::kM + warp * 16;
  const int first_step = static_cast<int>(blockIdx.z) * p.steps_per_split;
  const int all_steps = (p.k + Tile::kK - 1) / Tile::kK;
  const int end_step = min(first_step + p.steps_per_split, all_steps);

  __device__ __forceinline__ uint32_t stage_of(int step) const {
    return shared + static_cast<uint32_t>((step - first_step) % Tile::kStages) * Tile::kStageBytes;
  }

  __device__ __forceinline__ void load(int step) const {
    if (step < end_step) {
      const Copy copy{shared};
      const uint32_t tile = stage_of(step) - shared;
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

  __device__ __forceinline__ void store(const typename Product::Accumulators& acc) const {
    float* z = p.z + static_cast<int64_t>(blockIdx.z) * p.m * p.columns;
#pragma unroll
    for (int j = 0; j < Product::kColumnBlocks; ++j) {
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
    const Product product{p.mask, {row0 + lane / 4, row0 + lane / 4 + 8}};
    typename Product::Accumulators acc;
    product.clear(acc);
    for (int step = first_step; step < end_step; ++step) {
      ptx::cp_async_wait_group<Tile::kStages - 2>();
      __syncthreads();  // before a read of the loaded stage and before a write to the freed one
      load(step + Tile::kStages - 1);
      product.multiply(acc, stage_of(step), step * Tile::kK);
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
