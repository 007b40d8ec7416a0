// lora_gemm on mma.sync (sm_80 and later).
//
//   global --cp.async--> ring of stages --ldmatrix--> fragments --mma.sync--> accumulators
//          --slab--> Y
//
// Persistent blocks: each iterates over tiles of Y. Start reading at run(), the loop over tiles;
// multiply_main(), the main loop; gemm/sm80/loads.h, what each step loads.
//
// Invariant: the stage of the step that is being multiplied has arrived. To keep it, the last
// quarter of a step waits for the stage of the next step.
#pragma once
#include "kernels/gemm/sm80/epilogue.h"
#include "kernels/gemm/sm80/fragments.h"
#include "kernels/gemm/sm80/loads.h"
#include "kernels/tile/halves.h"

namespace lora_ext::kernel {

// The interface of the low-rank product to LoraGemmSm80: here for one adapter, whose T and U are
// those of p. grouped/gemm.h has that for many.
struct OneAdapter : TilesOfAllRows {
  using Rows = SameRows;
  static constexpr bool kAddsOntoBase = true;
  struct Cursor {
  };  // position of a tile's low-rank steps; empty if these are the same in all tiles
  const Rows rows{};

  // The terms of a tile's low-rank product, and the steps of one term.
  template <class Params>
  __device__ __forceinline__ static int parts(const Params& p) {
    return p.terms;
  }
  template <class Params>
  __device__ __forceinline__ static int steps(const Params& p, const Cursor&) {
    return (p.rank + 63) / 64;
  }
  __device__ __forceinline__ static void begin(Cursor&, int /*row*/) {}
  template <class Loads>
  __device__ __forceinline__ static void begin_part(Loads& loads, int part) {
    const auto& p = loads.p;
    const auto& factors = p.low_rank[part];
    loads.begin_product(factors.t, p.t_pitch, factors.u, p.u_pitch, p.rank);
  }
  template <class Loads>
  __device__ __forceinline__ static void copy_step(Loads& loads) {
    loads.copy_step();
  }
  // Whether the copies of this step differ from those of P Q.
  template <class Loads>
  __device__ __forceinline__ static constexpr bool copies_apart(const Loads&) {
    return false;
  }

  // Columns past the rank, rounded up to the 16 of an mma, are not multiplied.
  template <class Gemm>
  __device__ __forceinline__ static void multiply(const Gemm& gemm,
                                                  typename Gemm::Accumulators& acc,
                                                  typename Gemm::Walk& walk,
                                                  typename Gemm::Loads& loads, const Span&) {
#pragma unroll 1
    for (int term = 0; term < gemm.p.terms; ++term) {
      gemm.template scale_for_lo<true>(acc, term);
      gemm.template scale_for_lo<false>(acc, term);
#pragma unroll 1
      for (int left = gemm.p.rank; left > 0; left -= 64) {
        gemm.multiply(acc, walk.stage, min((left + 15) / 16, 4));
        gemm.finish_step(walk, loads);
        loads.step();
      }
    }
  }
};

template <class T, class Tile, bool kMNMajor, bool kMasked, class Adapters = OneAdapter>
struct LoraGemmSm80 {
  using TileOf = Tile;
  using Warp = LoraGemmWarp<T, Tile, kMNMajor>;
  using Fragments = typename Warp::Fragments;
  using Accumulators = typename Warp::Accumulators;
  using Loads = LoraGemmLoads<T, Tile, kMNMajor, kMasked, Adapters>;
  using Epilogue =
      LoraGemmEpilogue<T, Tile, Adapters::kAddsOntoBase && adds_onto_base<Tile, kMNMajor>,
                       typename Adapters::Rows>;

  const LoraGemmParams<T>& p;
  const Adapters adapters{};
  const Warp warp{};
  const LoraGemmRaster<Tile> raster{adapters.row_tiles(p, Tile::kM),
                                    (p.n + Tile::kN - 1) / Tile::kN};

  // Where the products are: the offset of the step's stage.
  struct Walk {
    uint32_t stage;
  };

  // Multiplies the first `k16_steps` of a stage's four.
  __device__ __forceinline__ void multiply(Accumulators& acc, uint32_t stage, int k16_steps) const {
#pragma unroll 1
    for (int k16 = 0; k16 < k16_steps; ++k16) {
      Fragments fragments;
      warp.load(fragments, stage, k16);
      warp.multiply(acc, fragments);
    }
  }

  // One barrier for both ends of the ring: every thread's copies into the next step's stage have
  // arrived, and every warp has finished reading this step's stage, which the copies issued now
  // overwrite. A group is committed for every step, so that "all but the latest kStages - 2" always
  // means the next step.
  __device__ __forceinline__ void finish_step(Walk& walk, Loads& loads) const {
    ptx::cp_async_commit_group();
    ptx::cp_async_wait_group<Tile::kStages - 2>();
    __syncthreads();
    walk.stage = next_stage(walk.stage), loads.stage = next_stage(loads.stage);
  }
  __device__ __forceinline__ static uint32_t next_stage(uint32_t stage) {
    constexpr uint32_t kLast = (Tile::kStages - 1) * Tile::kStageBytes;
    return stage == kLast ? 0 : stage + Tile::kStageBytes;
  }

  // P Q of a tile. 64 along k are four quarters: while one is multiplied, the fragments of the next
  // are loaded; ptxas interleaves these loads with the products, as there is no branch. The last
  // quarter, after the step's barrier, has the next step's first fragments and the copies.
  template <class Span>
  __device__ __forceinline__ void multiply_main(Accumulators& acc, Walk& walk, Loads& loads,
                                                const Span& rows) const {
    static_assert(Tile::kK == 64);
    if (!rows.has_products()) return;  // no stage may have been loaded
    Fragments now, then;
    warp.load(now, walk.stage, 0);
#pragma unroll 1
    for (int left = adapters.main_steps(p, rows); left > 0; --left) {
      multiply_quarter<false>(acc, now, then, walk.stage, 1, loads);
      multiply_quarter<false>(acc, then, now, walk.stage, 2, loads);
      multiply_quarter<false>(acc, now, then, walk.stage, 3, loads);
      finish_step(walk, loads);
      if (loads.steps == 0) loads.begin_part();
      if (adapters.copies_apart(loads)) {
        loads.step();
        warp.multiply(acc, then);
        warp.load(now, walk.stage, 0);
      } else {
        multiply_quarter<true>(acc, then, now, walk.stage, 0, loads);
      }
    }
  }

  // Multiplies 16 along k of `now`; meanwhile loads the fragments `then` from a stage at k16 and
  // issues all copies of a step: together, as the first copy after a fragment load costs three more
  // instructions.
  template <bool kCopies>
  __device__ __forceinline__ void multiply_quarter(Accumulators& acc, const Fragments& now,
                                                   Fragments& then, uint32_t stage, int k16,
                                                   Loads& loads) const {
#pragma unroll
    for (int i = 0; i < Warp::kRowBlocks; ++i) {
#pragma unroll
      for (int pair = 2 * i; pair < min(2 * i + 2, Warp::kPairs); ++pair)
        warp.load_right(then.right[pair], stage, pair, k16);
      if (kCopies && i == 1) loads.copy_step();
      warp.multiply_block(acc, now, i);
      warp.load_left(then.left[i], stage, i, k16);
    }
  }

  __device__ __forceinline__ static void clear(Accumulators& acc) {
#pragma unroll
    for (int i = 0; i < Warp::kRowBlocks; ++i) {
#pragma unroll
      for (int j = 0; j < Warp::kColumnBlocks; ++j) {
#pragma unroll
        for (int e = 0; e < 4; ++e) acc[i][j][e] = 0.f;
      }
    }
  }

  // The terms with lo, which is stored scaled by kLoScale, come before hi hi: the sum is scaled
  // before and after them. The scales are powers of two, hence exact.
  template <bool kEnter>
  __device__ __forceinline__ void scale_for_lo(Accumulators& acc, int term) const {
    constexpr float kFactor = kEnter ? kLoScale<T> : 1.f / kLoScale<T>;
    if constexpr (kFactor != 1.f && !(kEnter && kMasked)) {  // masked: the sum begins here, at 0
      constexpr int kTermsBefore = kEnter ? 0 : kMaxLowRankTerms - 1;
      if (p.terms == kMaxLowRankTerms && term == kTermsBefore) {
#pragma unroll
        for (int i = 0; i < Warp::kRowBlocks; ++i) {
#pragma unroll
          for (int j = 0; j < Warp::kColumnBlocks; ++j) {
#pragma unroll
            for (int e = 0; e < 4; ++e) acc[i][j][e] *= kFactor;
          }
        }
      }
    }
  }

  __device__ __forceinline__ void run() const {
    Loads loads{p, adapters, raster, warp.shared};
    Walk walk{};
    for (int i = 0; i < Tile::kStages - 1; ++i) {
      loads.step();
      ptx::cp_async_commit_group();
      loads.stage += Tile::kStageBytes;
    }
    ptx::cp_async_wait_group<Tile::kStages - 2>();
    __syncthreads();
    loads.step();
    for (int tile = static_cast<int>(blockIdx.x); tile < raster.tiles();
         tile += static_cast<int>(gridDim.x)) {
      const auto found = adapters.span_at(raster.place_of(tile).row);
      if (found.is_empty()) continue;
      Accumulators acc;
      if constexpr (kMasked) {
        // Drawn while no accumulators are live: both together would spill.
        const LoraGemmPlace at = raster.place_of(tile);
        const auto rows = adapters.span_at(at.row);
        const Epilogue epilogue = adapters.template epilogue<Epilogue>(p, rows, adapters.rows);
        const auto kept = epilogue.draw(rows.begin + warp.row, at.column + warp.column);
        clear(acc);
        adapters.multiply(*this, acc, walk, loads, rows);
        epilogue.mask(acc, kept);
        multiply_main(acc, walk, loads, rows);
        epilogue.store(acc, rows.begin + warp.row, at.column + warp.column);
      } else {
        clear(acc);
        multiply_main(acc, walk, loads, found);
        const LoraGemmPlace at = raster.place_of(tile);
        const auto rows = adapters.span_at(at.row);
        adapters.multiply(*this, acc, walk, loads, rows);
        adapters.template epilogue<Epilogue>(p, rows, adapters.rows)
            .store(acc, rows.begin + warp.row, at.column + warp.column);
      }
    }
    ptx::cp_async_commit_group();  // steps past the last tile commit a group, too
    ptx::cp_async_wait_group<0>();
  }
};

template <class T, class Tile, bool kMNMajor, bool kMasked>
__global__ void __launch_bounds__(Tile::kThreads)
    lora_gemm_sm80(const __grid_constant__ LoraGemmParams<T> p) {
  if constexpr (has_code<Tile>) LoraGemmSm80<T, Tile, kMNMajor, kMasked>{p}.run();
}

}  // namespace lora_ext::kernel
