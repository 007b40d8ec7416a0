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

// What LoraGemmSm80 asks of the low-rank product: here, of one adapter, whose T and U are p's own.
// lora_grouped_gemm.h has that of many.
struct OneAdapter {
  using Rows = SameRows;
  struct Cursor {};  // where the low-rank steps of a tile are, if that does not follow from a step
  const Rows rows{};

  template <class Gemm>
  __device__ __forceinline__ static int steps(const Gemm& gemm, const Cursor&) {
    return gemm.steps_per_term * gemm.p.terms;
  }
  __device__ __forceinline__ static void begin(Cursor&, int /*row*/) {}
  // The next tile to load that has any steps.
  template <class Gemm>
  __device__ __forceinline__ static void begin_next(const Gemm&, typename Gemm::Walk& next) {
    next.tile += static_cast<int>(gridDim.x), next.step = 0;
  }
  template <class Gemm>
  __device__ __forceinline__ static void load(const Gemm& gemm, typename Gemm::Walk& walk,
                                              int index, const typename Gemm::Place& at) {
    const int term = index / gemm.steps_per_term;
    const auto& factors = gemm.p.low_rank[term];
    gemm.copy_step(walk.stage, factors.t, gemm.p.t_pitch, factors.u, gemm.p.u_pitch, gemm.p.rank,
                   (index - term * gemm.steps_per_term) * 64, at);
  }
  template <class Gemm>
  __device__ __forceinline__ static void multiply(const Gemm& gemm,
                                                  typename Gemm::Accumulators& acc,
                                                  typename Gemm::Walk& walk) {
    gemm.template scale_for_lo<true>(acc, walk.step);
    gemm.template scale_for_lo<false>(acc, walk.step);
    gemm.multiply(acc, walk.stage, gemm.k16_steps_of(gemm.step_of(walk)));
  }
};

template <class T, class Tile, bool kMNMajor, bool kMasked, Alignment kAlignment,
          class Adapters = OneAdapter>
struct LoraGemmSm80 {
  using TileOf = Tile;
  using Copy = TileCopy<T, Tile::kThreads, kAlignment>;
  using Epilogue = LoraGemmEpilogue<T, Tile, kAlignment, adds_onto_base<Tile, kMNMajor>,
                                    typename Adapters::Rows>;
  using Accumulators = typename Epilogue::Accumulators;

  static_assert(!kMasked || fits_mask<Tile>);

  const LoraGemmParams<T>& p;
  const Adapters adapters{};
  const uint32_t shared = ptx::shared_address(ptx::dynamic_shared_memory());
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int warp_row = warp % (Tile::kM / Tile::kWarpM) * Tile::kWarpM;
  const int warp_column = warp / (Tile::kM / Tile::kWarpM) * Tile::kWarpN;
  const int row_tiles = (p.m + Tile::kM - 1) / Tile::kM;
  const int column_tiles = (p.n + Tile::kN - 1) / Tile::kN;
  const int tiles = row_tiles * column_tiles;
  const int main_steps = (p.k + Tile::kK - 1) / Tile::kK;
  const int steps_per_term = (p.rank + Tile::kK - 1) / Tile::kK;

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

  // Where the loads or the products are.
  struct Walk {
    int tile, step, stage;
    typename Adapters::Cursor cursor;
  };
  __device__ __forceinline__ int low_rank_steps_of(const Walk& walk) const {
    return adapters.steps(*this, walk.cursor);
  }
  __device__ __forceinline__ int steps_of(const Walk& walk) const {
    return main_steps + low_rank_steps_of(walk);
  }

  // A step of a tile: of the main product, or of the low-rank one, which comes first if it is to be
  // masked.
  struct Step {
    bool low_rank;
    int index;  // among its product's steps
  };
  __device__ __forceinline__ Step step_of(const Walk& walk) const {
    const int step = walk.step;
    if constexpr (kMasked) {
      const bool low_rank = step < low_rank_steps_of(walk);
      return {low_rank, low_rank ? step : step - low_rank_steps_of(walk)};
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
    copy.template copy_rows<Tile::kM, Tile::kK>(
        tile, {left, left_pitch, p.m, k}, k0, [&](int row) { return adapters.rows(at.row + row); });
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

  __device__ __forceinline__ void load(Walk& walk) const {
    const Place at = place_of(walk.tile);
    const Step what = step_of(walk);
    if (what.low_rank) {
      adapters.load(*this, walk, what.index, at);
    } else {
      copy_step(walk.stage, p.p, p.p_pitch, p.q, p.q_pitch, p.k, what.index * Tile::kK, at);
    }
  }

  // Row blocks of 16 x 16: lanes 0..15 address the rows of the left half, 16..31 of the right half.
  __device__ __forceinline__ void load_left_block(uint32_t (&a)[4], uint32_t tile, int i,
                                                  int k16) const {
    ptx::ldmatrix_x4(a,
                     tile + row_chunk_offset(warp_row + i * 16 + lane % 16, k16 * 2 + lane / 16));
  }
  __device__ __forceinline__ void load_left(uint32_t (&a)[Epilogue::kRowBlocks][4], uint32_t tile,
                                            int k16) const {
#pragma unroll
    for (int i = 0; i < Epilogue::kRowBlocks; ++i) load_left_block(a[i], tile, i, k16);
  }

  // Column blocks of 16 x 8; one ldmatrix fills the fragments of two of them, j and the next.
  __device__ __forceinline__ void load_right_pair(uint32_t (&pair)[4], uint32_t tile, int j,
                                                  int k16) const {
    const int column = warp_column + j * 8;
    if constexpr (kMNMajor) {
      const int row = k16 * 16 + lane % 16;
      ptx::ldmatrix_x4_trans(pair,
                             tile + panel_chunk_offset<Tile::kK>(row, column / 8 + lane / 16));
    } else {
      const int row = column + lane / 16 * 8 + lane % 8;
      ptx::ldmatrix_x4(pair, tile + row_chunk_offset(row, k16 * 2 + lane / 8 % 2));
    }
  }
  __device__ __forceinline__ void load_right(uint32_t (&b)[Epilogue::kColumnBlocks][2],
                                             uint32_t tile, int k16) const {
#pragma unroll
    for (int j = 0; j < Epilogue::kColumnBlocks; j += 2) {
      uint32_t pair[4];
      load_right_pair(pair, tile, j, k16);
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

  // Loads the next step, over all tiles of this block. A group is committed for every step, even
  // past the last, so that "all but the latest kStages - 2" always means the step to multiply.
  __device__ __forceinline__ void load_next(Walk& next) const {
    if (next.tile < tiles) {
      load(next);
      ++next.step;
      if (next.step == steps_of(next)) adapters.begin_next(*this, next);
    }
    next.stage = following(next.stage);
    ptx::cp_async_commit_group();
  }
  __device__ __forceinline__ static int following(int stage) { return (stage + 1) % Tile::kStages; }

  __device__ __forceinline__ void run() const {
    const Epilogue epilogue{p, adapters.rows};
    Walk next{}, walk{};
    next.tile = static_cast<int>(blockIdx.x - gridDim.x);
    adapters.begin_next(*this, next);
    for (int i = 0; i < Tile::kStages - 1; ++i) load_next(next);
    Accumulators acc;
    for (int tile = static_cast<int>(blockIdx.x); tile < tiles;
         tile += static_cast<int>(gridDim.x)) {
      const Place at = place_of(tile);
      walk.tile = tile, walk.step = 0;
      adapters.begin(walk.cursor, at.row);
      clear(acc);
      for (; walk.step < steps_of(walk); ++walk.step) {
        ptx::cp_async_wait_group<Tile::kStages - 2>();
        // One barrier serves both ends of the ring: every thread's copies into this step's stage
        // are there, and every warp has left the stage that the copies below fill.
        __syncthreads();
        load_next(next);
        adapters.multiply(*this, acc, walk);
        if constexpr (kMasked) {
          if (walk.step == low_rank_steps_of(walk) - 1)
            epilogue.mask(acc, at.row + warp_row, at.column + warp_column);
        }
        walk.stage = following(walk.stage);
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
