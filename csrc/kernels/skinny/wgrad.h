// lora_wgrad: gradients of the adapters, split along the rows. skinny/elementwise.h sums the
// splits.
//
//     G[split]^T = P^T U            over the split's range of the m rows    [columns, c]
//
//     dA   P = drop(X), U = dS      [r, K]
//     dB   P = dY,      U = s S     [N, r], here transposed as well
//
// One grid computes one product or both. With fp32 adapters U's hi and lo halves are stored side by
// side.
//
// If lora_gemm on sm_90a computes dX, this grid may start beside its last tiles (programmatic
// dependent launch, PDL): all operands are ready by then.
#pragma once
#include <cstdint>

#include "kernels/gemm/params.h"
#include "kernels/tile/copy.h"
#include "kernels/tile/mask.h"
#include "ptx/memory.h"
#include "ptx/mma.h"
#include "ptx/sync.h"

namespace lora_ext::kernel {

template <class T>
struct LoraWgradProduct {
  const T* p;  // [m, c]
  const T* u;  // [m, columns]
  float* g;    // [splits, columns, c]
  int64_t p_pitch, u_pitch;
  int c, columns, splits;
  int steps_per_split;  // of 64 rows
  bool masked;          // whether P is masked; only in masked kernels
};

template <class T>
struct LoraWgradParams {
  LoraWgradProduct<T> product[2];  // the second may have no splits
  int m;
  Mask mask;
};

// 128 columns of P, 32 for each of four warps, and 64 columns of U. P is read once for every 64
// columns of U.
struct LoraWgradTile {
  static constexpr int kC = 128, kColumns = 64, kM = 64, kStages = 3, kThreads = 128;
  static constexpr uint32_t kLeftBytes = kM * kC * 2, kRightBytes = kM * kColumns * 2;
  static constexpr uint32_t kStageBytes = kLeftBytes + kRightBytes;
  static constexpr uint32_t kSharedBytes = kStages * kStageBytes;  // 72 KiB
};

// lora_wgrad on mma.sync: a block computes one tile of a product, [64, 128], from one split of the
// rows. Grid: tiles along c, tiles along the columns of U, splits of both products.

// Computes 128 columns of P by 64 of U from stages of both, one after the other.
template <class T, bool kMasked>
struct LoraWgradMultiply {
  using Tile = LoraWgradTile;
  static constexpr int kRowBlocks = 2, kColumnBlocks = Tile::kColumns / 8;
  using Accumulators = float[kRowBlocks][kColumnBlocks][4];

  const Mask& dropout;
  const int c0;  // the first column of P
  const uint64_t seed = kMasked ? static_cast<uint64_t>(*dropout.seed) : 0;  // once for all steps
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;

  __device__ __forceinline__ static void clear(Accumulators& acc) {
#pragma unroll
    for (int i = 0; i < kRowBlocks * kColumnBlocks * 4; ++i)
      acc[i / (kColumnBlocks * 4)][i / 4 % kColumnBlocks][i % 4] = 0.f;
  }

  // The fragments of P^T hold one column of P per lane and two rows per register: rows 2 (l % 4)
  // and 2 (l % 4) + 1, the same 8 rows further in registers 2 and 3. A draw decides eight elements
  // of one row: this lane holds four of them, and lane l ^ 4, which has the neighbouring column,
  // the other four. So each lane draws for one of the two rows, and the lanes exchange the bits.
  template <class RowOf>
  __device__ __forceinline__ void mask(uint32_t (&a)[kRowBlocks][4], int row0,
                                       const RowOf& row_of) const {
    const auto at = static_cast<uint64_t>(dropout.col_offset + c0 + warp * 32 + lane / 4);
    const bool odd = lane / 4 % 2 != 0;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int first = row0 + half * 8 + lane % 4 * 2;
      const auto row = [&](int which) {
        return static_cast<uint64_t>(dropout.row_offset + row_of(first + which));
      };
      if (dropout.aligned_to_draws()) {
        const philox::Words own = draw_words(seed, row(odd), philox::group_of(at));
#pragma unroll
        for (int word = 0; word < 4; ++word) {
          const uint32_t other = __shfl_xor_sync(0xFFFFFFFFu, own.w[word], 4);
          const uint32_t draws = odd ? (other >> 16 | (own.w[word] & 0xFFFF0000u))
                                     : ((own.w[word] & 0xFFFFu) | other << 16);
          keep_or_drop(a[word / 2][half * 2 + word % 2], draws, dropout);
        }
      } else {
#pragma unroll
        for (int word = 0; word < 4; ++word) {
          const uint32_t low = draw_for_element(seed, row(0), at + word * 8) & 0xFFFF;
          const uint32_t high = draw_for_element(seed, row(1), at + word * 8) << 16;
          keep_or_drop(a[word / 2][half * 2 + word % 2], low | high, dropout);
        }
      }
    }
  }

  // Multiplies a stage, whose rows begin at `row0`; row_of maps its rows to rows of the mask.
  template <class RowOf>
  __device__ __forceinline__ void multiply(Accumulators& acc, uint32_t left, int row0, bool masked,
                                           const RowOf& row_of) const {
    const uint32_t right = left + Tile::kLeftBytes;
#pragma unroll
    for (int m16 = 0; m16 < Tile::kM / 16; ++m16) {
      uint32_t a[kRowBlocks][4];
#pragma unroll
      for (int i = 0; i < kRowBlocks; ++i) {
        const int row = m16 * 16 + lane / 16 * 8 + lane % 8;
        ptx::ldmatrix_x4_trans(
            a[i], left + panel_chunk_offset<Tile::kM>(row, warp * 4 + i * 2 + lane / 8 % 2));
      }
      if constexpr (kMasked) {
        if (masked) mask(a, row0 + m16 * 16, row_of);
      }
#pragma unroll
      for (int j = 0; j < kColumnBlocks; j += 2) {
        uint32_t b[4];
        ptx::ldmatrix_x4_trans(b, right + row_chunk_offset(m16 * 16 + lane % 16, j + lane / 16));
#pragma unroll
        for (int i = 0; i < kRowBlocks; ++i) {
          ptx::mma_m16n8k16<T>(acc[i][j], a[i], {b[0], b[1]});
          ptx::mma_m16n8k16<T>(acc[i][j + 1], a[i], {b[2], b[3]});
        }
      }
    }
  }

  // Calls visit(c, column, sum) for this thread's sums; c is a column of P counted from c0,
  // `column` a column of U counted from 0.
  template <class Visit>
  __device__ __forceinline__ void for_each(const Accumulators& acc, const Visit& visit) const {
#pragma unroll
    for (int i = 0; i < kRowBlocks; ++i) {
#pragma unroll
      for (int j = 0; j < kColumnBlocks; ++j) {
#pragma unroll
        for (int e = 0; e < 4; ++e)
          visit(c0 + warp * 32 + i * 16 + e / 2 * 8 + lane / 4, j * 8 + lane % 4 * 2 + e % 2,
                acc[i][j][e]);
      }
    }
  }
};

template <class T, bool kMasked, Alignment kAlignment>
struct LoraWgradSm80 {
  using Tile = LoraWgradTile;
  using Copy = TileCopy<T, Tile::kThreads, kAlignment>;
  using Multiply = LoraWgradMultiply<T, kMasked>;
  // With PDL beside dX on wgmma, which needs rows of whole chunks.
  static constexpr bool kUsesPdl = kAlignment == Alignment::kVector;

  const LoraWgradParams<T>& p;
  const LoraWgradProduct<T>& product;
  const int split;
  const uint32_t shared = ptx::shared_address(ptx::dynamic_shared_memory());
  const int c0 = static_cast<int>(blockIdx.x) * Tile::kC;
  const int column0 = static_cast<int>(blockIdx.y) * Tile::kColumns;
  const int first_step = split * product.steps_per_split;
  const int all_steps = (p.m + Tile::kM - 1) / Tile::kM;
  const int end_step = min(first_step + product.steps_per_split, all_steps);

  __device__ __forceinline__ uint32_t stage_of(int step) const {
    return static_cast<uint32_t>((step - first_step) % Tile::kStages) * Tile::kStageBytes;
  }

  __device__ __forceinline__ void load(int step) const {
    if (step < end_step) {
      const Copy copy{shared};
      const uint32_t tile = stage_of(step);
      copy.template copy_tile<Tile::kM, Tile::kC>(
          tile, {product.p, product.p_pitch, p.m, product.c}, step * Tile::kM, c0);
      copy.template copy_tile<Tile::kM, Tile::kColumns>(
          tile + Tile::kLeftBytes, {product.u, product.u_pitch, p.m, product.columns},
          step * Tile::kM, column0);
    }
    ptx::cp_async_commit_group();
  }

  __device__ __forceinline__ void store(const typename Multiply::Accumulators& acc) const {
    float* g = product.g + static_cast<int64_t>(split) * product.columns * product.c;
    Multiply{p.mask, c0}.for_each(acc, [&](int c, int in_tile, float sum) {
      const int column = column0 + in_tile;
      if (c < product.c && column < product.columns)
        g[static_cast<int64_t>(column) * product.c + c] = sum;
    });
  }

  // The kernel after this grid also depends on the grid before this one, which may still compute
  // dX. So one block waits for that grid: the first, which always has a tile. Any more waiting
  // blocks would hold SMs that others could use. At the end of the kernel, after the return of
  // blocks without a tile, the wait would cost ten registers on sm_90a and with them one of three
  // blocks per SM.
  __device__ __forceinline__ void wait_for_dx() const {
    if (blockIdx.x + blockIdx.y + blockIdx.z == 0) ptx::griddepcontrol_wait();
  }

  __device__ __forceinline__ void run() const {
    if (c0 >= product.c || column0 >= product.columns) return;
    for (int i = 0; i < Tile::kStages - 1; ++i) load(first_step + i);
    const Multiply multiply{p.mask, c0};
    typename Multiply::Accumulators acc;
    multiply.clear(acc);
    for (int step = first_step; step < end_step; ++step) {
      ptx::cp_async_wait_group<Tile::kStages - 2>();
      __syncthreads();  // before a read of the loaded stage and before a write to the freed one
      load(step + Tile::kStages - 1);
      multiply.multiply(acc, shared + stage_of(step), step * Tile::kM, product.masked,
                        [](int row) { return row; });
    }
    store(acc);
    if constexpr (kUsesPdl) wait_for_dx();
  }
};

template <class T, bool kMasked, Alignment kAlignment>
__global__ void __launch_bounds__(LoraWgradTile::kThreads)
    lora_wgrad_sm80(const __grid_constant__ LoraWgradParams<T> p) {
  using Wgrad = LoraWgradSm80<T, kMasked, kAlignment>;
  const int split = static_cast<int>(blockIdx.z);
  const bool second = split >= p.product[0].splits;
  Wgrad{p, p.product[second], second ? split - p.product[0].splits : split}.run();
}

}  // namespace lora_ext::kernel
