// lora_decode on mma.sync (sm_80 and later).
//
//   W, or A, and X --cp.async--> ring of stages --ldmatrix--> fragments --mma.sync--> accumulators
//                  --partial sums--> the block that arrives last at a tile --> S, T or Y
//
// Start reading at run(), the main loop, and at arrive_is_last(), which counts arrivals at a tile.
#pragma once
#include "kernels/decode/finish.h"
#include "kernels/tile/copy.h"
#include "kernels/tile/factor_chunk.h"
#include "ptx/memory.h"
#include "ptx/mma.h"
#include "ptx/sync.h"

namespace lora_ext::kernel {

template <class T, class F, class Tile>
struct LoraDecodeSm80 {
  static constexpr bool kSplit = std::is_same_v<F, float>;
  using Copy = TileCopy<T, Tile::kThreads, Alignment::kVector>;
  using Table = LoraDecodeTable<Tile>;
  using Work = LoraDecodeWork<T, Tile>;
  using Walk = typename Work::Walk;
  using Finish = LoraDecodeFinish<T, F, Tile>;
  using Accumulators = typename Finish::Accumulators;
  static_assert(sizeof(Table) <= Tile::kTableBytes);

  const LoraDecodeParams<T>& p;
  Table& table;
  const Work work{p, table.row_blocks};
  const Finish finish{p, table, work};
  const uint32_t shared = ptx::shared_address(ptx::dynamic_shared_memory());
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;

  // Where A has a chunk of a row of S; nowhere past the last adapter's rank. With floats, the lower
  // eight rows of each 16 are lo.
  __device__ __forceinline__ FactorPlace<F> place_of(int row_of_s, int column) const {
    const int block = row_of_s / 16, within = row_of_s % 16;
    const LoraDecodeAdapter& own = table.adapters[table.number_of_block(block)];
    const int rank = (block - own.first_block) * (kSplit ? 8 : 16) + (kSplit ? within % 8 : within);
    const int left = p.k - column;
    if (rank >= own.rank || left <= 0) return {reinterpret_cast<const F*>(p.w), 0, true, false};
    const LoraGroupedEntry entry = decode_entry<F>(p, own.adapter);
    const auto bytes = static_cast<uintptr_t>(entry.a_pitch) * sizeof(F);
    return {static_cast<const F*>(entry.a) + rank * entry.a_pitch + column, left,
            (reinterpret_cast<uintptr_t>(entry.a) | bytes) % 16 == 0, within >= 8};
  }

  // Copies a step of S's rows of A; of floats kTogether chunks of a thread are in flight at once.
  template <int kTogether = 1>
  __device__ __forceinline__ void load_factors(const Walk& walk, int stage) const {
    constexpr int kAll = Tile::kRows * 8;
    static_assert(kAll % (kTogether * Tile::kThreads) == 0);
    const uint32_t tile = static_cast<uint32_t>(stage) * Tile::kStageBytes;
#pragma unroll 1
    for (int index = static_cast<int>(threadIdx.x); index < kAll;
         index += kTogether * Tile::kThreads) {
      uint32_t to[kTogether];
      FactorPlace<F> places[kTogether];
#pragma unroll
      for (int i = 0; i < kTogether; ++i) {
        const int row = (index + i * Tile::kThreads) / 8, chunk = index % 8;
        to[i] = tile + row_chunk_offset(row, chunk);
        places[i] = place_of(walk.tile * Tile::kRows + row, walk.step * Tile::kK + chunk * 8);
      }
      copy_factor_chunks<T>(shared, to, places);
    }
  }

  // Issues the copies of a step, and waits for floats, unless they are left to load_first_floats.
  template <bool kFloats>
  __device__ __forceinline__ void load(const Walk& walk, int stage) const {
    const Copy copy{shared};
    const uint32_t tile = static_cast<uint32_t>(stage) * Tile::kStageBytes;
    const int k0 = walk.step * Tile::kK;
    if (walk.of_s) {
      if constexpr (kFloats || !kSplit) load_factors(walk, stage);
    } else {
      copy.template copy_tile<Tile::kRows, Tile::kK>(tile, {p.w, p.w_pitch, p.n, p.k},
                                                     walk.tile * Tile::kRows, k0);
    }
    if (threadIdx.x < Tile::kBatch * 8) {
      copy.template copy_tile<Tile::kBatch, Tile::kK>(tile + Tile::kWeightBytes,
                                                      {p.x, p.x_pitch, p.m, p.k}, 0, k0);
    }
  }
  // Loads the block's next step. A cp.async group is committed for every step, even past the last,
  // so that "all but the latest kStages - 2" always means the step to multiply.
  template <bool kFloats = true>
  __device__ __forceinline__ void load_next(Walk& walk, int stage) const {
    if (walk.step < walk.end || work.next(walk)) {
      load<kFloats>(walk, stage);
      ++walk.step;
    }
    ptx::cp_async_commit_group();
  }
  // Loads the floats of the first steps, all of whose other copies are under way. There are no sums
  // yet, so there are registers for several chunks.
  __device__ __forceinline__ void load_first_floats(Walk walk) const {
#pragma unroll 1
    for (int i = 0; i < Tile::kStages - 1; ++i) {
      if (walk.step == walk.end) work.next(walk);
      if (!walk.of_s) return;  // S comes first
      load_factors<4>(walk, i);
      ++walk.step;
    }
  }
  __device__ __forceinline__ static int next_stage(int stage) {
    return (stage + 1) % Tile::kStages;
  }

  // Multiplies 16 rows of W with all rows of X: an ldmatrix loads 32 along k of eight rows of X.
  __device__ __forceinline__ void multiply(Accumulators& acc, int stage) const {
    const uint32_t left = shared + static_cast<uint32_t>(stage) * Tile::kStageBytes;
    const uint32_t right = left + Tile::kWeightBytes;
#pragma unroll
    for (int k32 = 0; k32 < Tile::kK / 32; ++k32) {
      uint32_t a[2][4];
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int row = warp * 16 + lane % 16, chunk = k32 * 4 + half * 2 + lane / 16;
        ptx::ldmatrix_x4(a[half], left + row_chunk_offset(row, chunk));
      }
#pragma unroll
      for (int j = 0; j < Tile::kBlocks; ++j) {
        uint32_t b[4];
        ptx::ldmatrix_x4(b, right + row_chunk_offset(j * 8 + lane % 8, k32 * 4 + lane / 8));
        ptx::mma_m16n8k16<T>(acc[j], a[0], {b[0], b[1]});
        ptx::mma_m16n8k16<T>(acc[j], a[1], {b[2], b[3]});
      }
    }
  }

  // Counts an arrival, by one thread, after a barrier of all threads that have written the partial
  // sum; returns whether it is the last. All partial sums are then visible to that thread, and to
  // threads that a barrier orders after it.
  __device__ __forceinline__ static bool count(uint32_t* arrivals, uint32_t parts) {
    ptx::fence_acq_rel_gpu();
    const bool last = ptx::atomic_add_relaxed_gpu(arrivals, 1) == parts - 1;
    if (last) {
      ptx::fence_acq_rel_gpu();
      atomicExch(arrivals, 0u);
    }
    return last;
  }
  // The same, called by the whole block.
  __device__ __forceinline__ bool arrive_is_last(uint32_t* arrivals, uint32_t parts) const {
    __syncthreads();
    if (threadIdx.x == 0) table.is_last = count(arrivals, parts);
    __syncthreads();
    return table.is_last != 0;
  }

  __device__ __forceinline__ void part_of_y(int tile, const Accumulators& acc) const {
    finish.store_partial(p.sums, tile + static_cast<int>(blockIdx.x), acc);
    if (arrive_is_last(p.arrivals + tile, work.parts_of(tile))) finish.finish_y(tile);
  }

  __device__ __forceinline__ void part_of_s(const Walk& walk, const Accumulators& acc) const {
    if (finish.has_s(walk.tile)) finish.store_partial(p.s_sums, work.s_slot(walk), acc);
    const auto parts = work.shares.s_parts(walk.tile);
    if (!arrive_is_last(p.s_arrivals + walk.tile, static_cast<uint32_t>(parts.count))) return;
    finish.finish_s(walk.tile, parts.slot, parts.count);
    if (s_is_complete()) signal_s_ready();
  }

  // Whether the tile of S that this block has finished is the last. A single one is not counted:
  // that would be two round trips through L2 before the tiles of Y can have S.
  __device__ __forceinline__ bool s_is_complete() const {
    if (work.shares.s_tiles > 1)
      return arrive_is_last(p.s_tiles, static_cast<uint32_t>(work.shares.s_tiles));
    __syncthreads();  // between the block's stores of T and the counts of its threads
    return true;
  }

  // S is complete: one more arrival at each tile of Y, which is the last one if all others have
  // arrived before.
  __device__ __forceinline__ void signal_s_ready() const {
    for (int first = 0; first < work.shares.tiles; first += Tile::kThreads) {
      const int tile = first + static_cast<int>(threadIdx.x);
      const bool last = tile < work.shares.tiles && count(p.arrivals + tile, work.parts_of(tile));
      const uint32_t lanes = __ballot_sync(0xFFFFFFFFu, last);
      if (lane == 0) table.to_finish[warp] = lanes;
      __syncthreads();
      for (int of_warp = 0; of_warp < Tile::kWarps; ++of_warp) {
        for (uint32_t left = table.to_finish[of_warp]; left != 0; left &= left - 1)
          finish.finish_y(first + of_warp * 32 + __ffs(static_cast<int>(left)) - 1);
      }
      __syncthreads();
    }
  }

  __device__ __forceinline__ void run() const {
    Walk loads = work.begin(), products = loads;
    for (int i = 0; i < Tile::kStages - 1; ++i) load_next<false>(loads, i);
    if constexpr (kSplit) load_first_floats(products);
    int stage = 0, filled = Tile::kStages - 1;
    while (work.next(products)) {
      Accumulators acc;
      Finish::LowRank::clear(acc);
      for (; products.step < products.end; ++products.step) {
        ptx::cp_async_wait_group<Tile::kStages - 2>();
        __syncthreads();  // before a read of the loaded stage and before a write to the freed one
        load_next(loads, filled);
        multiply(acc, stage);
        stage = next_stage(stage), filled = next_stage(filled);
      }
      products.of_s ? part_of_s(products, acc) : part_of_y(products.tile, acc);
    }
  }
};

template <class T, class F, int kBatch>
__global__ void __launch_bounds__(LoraDecodeTile<kBatch>::kThreads,
                                  LoraDecodeTile<kBatch>::kResident)
    lora_decode_sm80(const __grid_constant__ LoraDecodeParams<T> p) {
  using Tile = LoraDecodeTile<kBatch>;
  using Table = LoraDecodeTable<Tile>;
  Table& table = *reinterpret_cast<Table*>(ptx::dynamic_shared_memory() + Tile::kTable);
  table.make(p, std::is_same_v<F, float>);
  LoraDecodeSm80<T, F, Tile>{p, table}.run();
}

}  // namespace lora_ext::kernel
