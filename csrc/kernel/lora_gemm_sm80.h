// lora_gemm on mma.sync (sm_80 and later).
//
//   global --cp.async--> ring of stages --ldmatrix--> fragments --mma.sync--> accumulators
//          --slab--> Y
//
// Blocks are persistent: each walks over tiles of Y, and the copies run kStages - 1 steps ahead of
// the products, across the end of a tile, so that a tile's first stages arrive while the one before
// is stored. Lines to start reading at: run() is the main loop, load() what a step brings.
#pragma once
#include "kernel/halves.h"
#include "kernel/lora_gemm.h"
#include "kernel/lora_gemm_sm80_epilogue.h"
#include "kernel/tile_copy_sm80.h"
#include "ptx/matrix_move.h"
#include "ptx/mma.h"

namespace lora_ext::kernel {

template <class T, class Tile, bool kMNMajor, bool kMasked, Alignment kAlignment>
struct LoraGemmSm80 {
  using Copy = TileCopy<T, Tile::kThreads, kAlignment>;
  using Epilogue = LoraGemmEpilogue<T, Tile, kAlignment, adds_onto_base<Tile, kMNMajor>>;
  using Accumulators = typename Epilogue::Accumulators;

  static_assert(!kMasked || fits_mask<Tile>);

  const LoraGemmParams<T>& p;
  const uint32_t shared = ptx::shared_address(ptx::dynamic_shared_memory());
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int warp_row = warp % (Tile::kM / Tile::kWarpM) * Tile::kWarpM;
  const int warp_column = warp / (Tile::kM / Tile::kWarpM) * Tile::kWarpN;
  const int row_tiles = (p.m + Tile::kM - 1) / Tile::kM;
  const int column_tiles = (p.n + Tile::kN - 1) / Tile::kN;
  const int tiles = row_tiles * column_tiles;
  const int main_steps = (p.k + Tile::kK - 1) / Tile::kK;
  const int steps_per_term = (p.rank + Tile::kK - 1) / Tile::kK;
  const int low_rank_steps = steps_per_term * p.terms;
  const int steps = main_steps + low_rank_steps;

  // Tiles in an order that keeps eight row blocks of P and one column block of Q in L2.
  struct Place {
    int row, column;
  };
  __device__ __forceinline__ Place place_of(int tile) const {
    constexpr int kGroup = 8;
    const int first = tile / (kGroup * column_tiles) * kGroup;
    const int height = row_tiles - first >= kGroup ? kGroup : row_tiles - first;
    const int within = tile - first * column_tiles;
    return {(first + within % height) * Tile::kM, within / height * Tile::kN};
  }

  // A step of a tile: of the main product, or of the low-rank one, which comes first if it is to be
  // masked.
  struct Step {
    bool low_rank;
    int index;  // among its product's steps
  };
  __device__ __forceinline__ Step step_of(int step) const {
    if constexpr (kMasked) {
      const bool low_rank = step < low_rank_steps;
      return {low_rank, low_rank ? step : step - low_rank_steps};
    } else {
      const bool low_rank = step >= main_steps;
      return {low_rank, low_rank ? step - main_steps : step};
    }
  }

  // Starts the copies of 64 along k of left [m, k] and right [n, k] or [k, n].
  __device__ __forceinline__ void copy_step(int stage, const T* left, int64_t left_pitch,
                                            const T* right, int64_t right_pitch, int k, int k0,
                                            const Place& at) const {
    const Copy copy{shared};
    const uint32_t tile = static_cast<uint32_t>(stage) * Tile::kStageBytes;
    copy.template copy_tile<Tile::kM, Tile::kK>(tile, {left, left_pitch, p.m, k}, at.row, k0);
    if constexpr (kMNMajor) {
      copy.template copy_tile<Tile::kK, Tile::kN>(tile + Tile::kLeftBytes,
                                                  {right, right_pitch, k, p.n}, k0, at.column);
    } else {
      copy.template copy_tile<Tile::kN, Tile::kK>(tile + Tile::kLeftBytes,
                                                  {right, right_pitch, p.n, k}, at.column, k0);
    }
  }

  __device__ __forceinline__ int step_of_low_rank(int index) const {
    return index + (1 - kMasked) * main_steps;
  }

  __device__ __forceinline__ void load(int tile, int step, int stage) const {
    const Place at = place_of(tile);
    const Step what = step_of(step);
    if (what.low_rank) {
      const int term = what.index / steps_per_term;
      const auto& factors = p.low_rank[term];
      copy_step(stage, factors.t, p.t_pitch, factors.u, p.u_pitch, p.rank,
                (what.index - term * steps_per_term) * Tile::kK, at);
    } else {
      copy_step(stage, p.p, p.p_pitch, p.q, p.q_pitch, p.k, what.index * Tile::kK, at);
    }
  }

  // Row blocks of 16 x 16: lanes 0..15 address the rows of the left half, 16..31 of the right half.
  __device__ __forceinline__ void load_left(uint32_t (&a)[Epilogue::kRowBlocks][4], uint32_t tile,
                                            int k16) const {
#pragma unroll
    for (int i = 0; i < Epilogue::kRowBlocks; ++i) {
      const int row = warp_row + i * 16 + lane % 16;
      ptx::ldmatrix_x4(a[i], tile + row_chunk_offset(row, k16 * 2 + lane / 16));
    }
  }

  // Column blocks of 16 x 8; one ldmatrix fills the fragments of two of them.
  __device__ __forceinline__ void load_right(uint32_t (&b)[Epilogue::kColumnBlocks][2],
                                             uint32_t tile, int k16) const {
#pragma unroll
    for (int j = 0; j < Epilogue::kColumnBlocks; j += 2) {
      const int column = warp_column + j * 8;
      uint32_t pair[4];
      if constexpr (kMNMajor) {
        const int row = k16 * 16 + lane % 16;
        ptx::ldmatrix_x4_trans(pair,
                               tile + panel_chunk_offset<Tile::kK>(row, column / 8 + lane / 16));
      } else {
        const int row = column + lane / 16 * 8 + lane % 8;
        ptx::ldmatrix_x4(pair, tile + row_chunk_offset(row, k16 * 2 + lane / 8 % 2));
      }
      b[j][0] = pair[0], b[j][1] = pair[1], b[j + 1][0] = pair[2], b[j + 1][1] = pair[3];
    }
  }

  // The first `k16_steps` of a stage's four, or all: those past the rank would multiply zeros.
  __device__ __forceinline__ void multiply(Accumulators& acc, int stage, int k16_steps) const {
    const uint32_t left = shared + static_cast<uint32_t>(stage) * Tile::kStageBytes;
    const uint32_t right = left + Tile::kLeftBytes;
#pragma unroll
    for (int k16 = 0; k16 < Tile::kK / 16; ++k16) {
      if (k16 >= k16_steps) break;
      uint32_t a[Epilogue::kRowBlocks][4], b[Epilogue::kColumnBlocks][2];
      load_left(a, left, k16);
      load_right(b, right, k16);
#pragma unroll
      for (int i = 0; i < Epilogue::kRowBlocks; ++i) {
#pragma unroll
        for (int j = 0; j < Epilogue::kColumnBlocks; ++j)
          ptx::mma_m16n8k16<T>(acc[i][j], a[i], b[j]);
      }
    }
  }

  __device__ __forceinline__ int k16_steps_of(const Step& what) const {
    if (!what.low_rank) return Tile::kK / 16;
    const int left = p.rank - what.index % steps_per_term * Tile::kK;
    return (left + 15) / 16;  // more than there are, but in the last step
  }

  __device__ __forceinline__ static void clear(Accumulators& acc) {
#pragma unroll
    for (int i = 0; i < Epilogue::kRowBlocks; ++i) {
#pragma unroll
      for (int j = 0; j < Epilogue::kColumnBlocks; ++j) {
#pragma unroll
        for (int e = 0; e < 4; ++e) acc[i][j][e] = 0.f;
      }
    }
  }

  // The terms with lo, which is kept kLoScale times as large, come before hi hi: around them the
  // sum is scaled, too. Powers of two, hence exact.
  template <bool kEnter>
  __device__ __forceinline__ void scale_for_lo(Accumulators& acc, int step) const {
    constexpr float kFactor = kEnter ? kLoScale<T> : 1.f / kLoScale<T>;
    if constexpr (kFactor != 1.f && !(kEnter && kMasked)) {  // masked, the sum begins here, with 0
      constexpr int kTermsBefore = kEnter ? 0 : kMaxLowRankTerms - 1;
      const int first = step_of_low_rank(kTermsBefore * steps_per_term);
      if (p.terms == kMaxLowRankTerms && step == first) {
#pragma unroll
        for (int i = 0; i < Epilogue::kRowBlocks; ++i) {
#pragma unroll
          for (int j = 0; j < Epilogue::kColumnBlocks; ++j) {
#pragma unroll
            for (int e = 0; e < 4; ++e) acc[i][j][e] *= kFactor;
          }
        }
      }
    }
  }

  // The next step to load, over all tiles of this block. A group is committed for every step, even
  // past the last, so that "all but the latest kStages - 2" always means the step to multiply.
  struct Loads {
    int tile, step = 0, stage = 0;
  };
  __device__ __forceinline__ void load_next(Loads& next) const {
    if (next.tile < tiles) {
      load(next.tile, next.step, next.stage);
      ++next.step;
      if (next.step == steps) {
        next.step = 0;
        next.tile += static_cast<int>(gridDim.x);
      }
    }
    next.stage = following(next.stage);
    ptx::cp_async_commit_group();
  }
  __device__ __forceinline__ static int following(int stage) { return (stage + 1) % Tile::kStages; }

  __device__ __forceinline__ void run() const {
    const Epilogue epilogue{p};
    Loads next{static_cast<int>(blockIdx.x)};
    for (int i = 0; i < Tile::kStages - 1; ++i) load_next(next);
    int stage = 0;
    Accumulators acc;
    for (int tile = static_cast<int>(blockIdx.x); tile < tiles;
         tile += static_cast<int>(gridDim.x)) {
      const Place at = place_of(tile);
      clear(acc);
      for (int step = 0; step < steps; ++step) {
        ptx::cp_async_wait_group<Tile::kStages - 2>();
        // One barrier serves both ends of the ring: every thread's copies into this step's stage
        // are there, and every warp has left the stage that the copies below fill.
        __syncthreads();
        load_next(next);
        const Step what = step_of(step);
        scale_for_lo<true>(acc, step);
        scale_for_lo<false>(acc, step);
        multiply(acc, stage, k16_steps_of(what));
        if constexpr (kMasked) {
          if (step == low_rank_steps - 1)
            epilogue.mask(acc, at.row + warp_row, at.column + warp_column);
        }
        stage = following(stage);
      }
      epilogue.store(acc, at.row + warp_row, at.column + warp_column);
    }
  }
};

template <class T, class Tile, bool kMNMajor, bool kMasked, Alignment kAlignment>
__global__ void __launch_bounds__(Tile::kThreads)
    lora_gemm_sm80(const __grid_constant__ LoraGemmParams<T> p) {
  LoraGemmSm80<T, Tile, kMNMajor, kMasked, kAlignment>{p}.run();
}

}  // namespace lora_ext::kernel
