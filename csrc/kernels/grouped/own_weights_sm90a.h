// lora_grouped_gemm_own_weights on wgmma and TMA (sm_90a).
//
//   rows of P, T and U --cp.async--> ring of stages --wgmma--> accumulators --slab--> rows of Y
//   Q -----------------------TMA--->
//
// The ring and the main loop are those of gemm/sm90a. What differs:
//
// - The producer is a whole warpgroup, as TMA cannot gather rows. Their copies are ordinary writes,
//   which wgmma sees behind a fence of the thread that made them.
// - Blocks form no clusters, since the tile below may have another expert's Q. So a step of 128 x
//   256 x 64 takes 48 KiB from L2, where the blocks of a pair take 32 each.
// - Q's map has the matrices of all experts, one below the other. Columns past n have the next
//   expert's numbers, and are not stored. MN-major, the last step begins at k - 64 instead, and P
//   has zeros there for what the step before has multiplied.
// - Rows of Y are stored by ordinary stores.
#pragma once
#include "kernels/gemm/sm90a/launch.h"
#include "kernels/grouped/own_weights.h"

namespace lora_ext::kernel {

struct OwnWeightsTile : LoraGemmSm90aTile128x256 {
  static constexpr int kClusterSize = 1, kPairM = kM;
  // 128 x 56 + 256 x 224 = 64,512
  static constexpr int kProducerRegisters = 56, kConsumerRegisters = 224;
  template <bool kMNMajor>
  static constexpr int kRightBoxRows = kMNMajor ? kK : kN;
  // At a stage's full barrier: each warp of the producer, and the thread that copies Q.
  static constexpr uint32_t kFills = kWarpgroup / 32 + 1;
};
static_assert(is_wgmma_as_planned<OwnWeightsTile>(plan::Tile::kWgmma128x256));

// What the roles share: the block's tiles, and the experts that they have.
template <class T, bool kMNMajor, bool kUMNMajor>
struct OwnWeightsSm90a {
  using Tile = OwnWeightsTile;
  using Block = LoraGemmSm90aBlock<T, Tile>;
  using Adapters = OwnWeights<T, kMNMajor, kUMNMajor, kLoScale<T> != 1.f>;
  using Ring = typename Block::Ring;

  const Block& block;
  const Adapters& adapters;

  // A tile that the block computes.
  struct Work {
    int tile;
    LoraGemmPlace at;  // at.row counts row tiles, as if each had all of its rows
    typename Adapters::Span span;
  };
  // The first tile from one on that is not passed over, or one past the last.
  __device__ __forceinline__ Work next(int tile) const {
    for (; tile < block.tiles; tile += block.tile_stride) {
      const auto at = block.place_of(tile);
      const auto span = adapters.span_at(at.row);
      if (!span.is_empty()) return {tile, {at.row, at.column}, span};
    }
    return {tile, {}, {-1, 0, 0}};
  }
  __device__ __forceinline__ Work after(const Work& work) const {
    return next(work.tile + block.tile_stride);
  }
  __device__ __forceinline__ bool ends(const Work& work) const { return work.tile >= block.tiles; }
};

template <class T, bool kMNMajor, bool kUMNMajor, bool kMasked>
struct OwnWeightsProducer {
  using Shared = OwnWeightsSm90a<T, kMNMajor, kUMNMajor>;
  using Tile = typename Shared::Tile;
  using Ring = typename Shared::Ring;
  using Work = typename Shared::Work;
  static constexpr int kRows = Tile::kM * 8 / Tile::kWarpgroup;  // of which a thread has a chunk
  static constexpr int kRowsApart = Tile::kM / kRows;
  // Stages that are filled before the first of them is handed over: one more, and its filling would
  // wait for consumers that wait for that.
  static constexpr int kBehind = Tile::kStages - 2;

  const Shared& shared;
  const int warp;
  const LoraGemmParams<T>& p = shared.block.p;
  const int thread = threadIdx.x, lane = thread % 32;
  const int row0 = thread / 8, chunk = thread % 8;

  // The stage to fill next, and how many are filled and not handed over.
  struct Progress {
    Ring ring;
    int filled = 0;
  };
  // As OwnWeights::load has them.
  struct Loads {
    struct TileOf : Tile {
      static constexpr int kThreads = Tile::kWarpgroup;
    };
    uint32_t shared, stage;
    typename Shared::Adapters::Cursor cursor;
  };
  // A tile's rows of P.
  struct Rows {
    const T* at[kRows];
    int count;
  };

  // A tile's rows are looked up while the tile before is loaded: each lane has one of its warp's.
  __device__ __forceinline__ void produce() const {
    Progress now;
    Work work = shared.next(shared.block.first_tile);
    int row = row_of(work);
    while (!shared.ends(work)) {
      const Work then = shared.after(work);
      const int next_row = row_of(then);
      if (work.span.has_products()) {
        const Rows rows = rows_of(work, row);
        if constexpr (!kMasked) load_main_product(now, work, rows);
        load_low_rank_product(now, work);
        if constexpr (kMasked) load_main_product(now, work, rows);
      }
      work = then, row = next_row;
    }
    ptx::cp_async_wait_group<0>();
#pragma unroll 1
    while (now.filled > 0) hand_over(now);
  }

  __device__ __forceinline__ int row_of(const Work& work) const {
    const int in_tile = warp * 4 + lane % 4 + lane / 4 * kRowsApart;
    return in_tile < work.span.count ? shared.adapters.rows(work.span.begin + in_tile) : 0;
  }
  __device__ __forceinline__ Rows rows_of(const Work& work, int row) const {
    Rows rows;
#pragma unroll
    for (int i = 0; i < kRows; ++i)
      rows.at[i] = p.p + __shfl_sync(0xFFFFFFFFu, row, i * 4 + lane / 8) * p.p_pitch;
    rows.count = work.span.count - row0;
    return rows;
  }

  __device__ __forceinline__ void load_main_product(Progress& now, const Work& work,
                                                    const Rows& rows) const {
#pragma unroll 1
    for (int k0 = 0; k0 < p.k; k0 += Tile::kK) {
      const int first = kMNMajor ? min(k0, p.k - Tile::kK) : k0, column = first + chunk * 8;
      const int inside = column < k0 ? 0 : min(max(p.k - column, 0), 8);
      begin(now, [&](uint32_t full) { copy_right(now, full, work, first); });
      const uint32_t to = shared.block.left(now.ring.slot) + row_chunk_offset(row0, chunk);
#pragma unroll
      for (int i = 0; i < kRows; ++i) {
        const bool is_row = i * kRowsApart < rows.count;
        ptx::cp_async_16(to + i * kRowsApart * Tile::kRowBytes, rows.at[i] + column,
                         is_row ? inside * sizeof(T) : 0);
      }
      end(now);
    }
  }

  __device__ __forceinline__ void load_low_rank_product(Progress& now, const Work& work) const {
#pragma unroll 1
    for (int k0 = 0; k0 < shared.adapters.depth(); k0 += Tile::kK) {
      begin(now, [](uint32_t full) { ptx::mbarrier_arrive_expect_tx(full, 0); });
      Loads loads{shared.block.shared, now.ring.slot * Tile::kStageBytes, {}};
      shared.adapters.begin(loads.cursor, work.at.row);
      shared.adapters.load(loads, work.at, k0);
      end(now);
    }
  }

  // Waits until the stage is empty; one thread calls copy(full barrier).
  template <class Copy>
  __device__ __forceinline__ void begin(const Progress& now, const Copy& copy) const {
    ptx::mbarrier_wait(shared.block.empty(now.ring.slot), now.ring.parity ^ 1);
    if (warp == 0 && ptx::elect_sync()) copy(shared.block.full(now.ring.slot));
  }
  __device__ __forceinline__ void end(Progress& now) const {
    ptx::cp_async_commit_group();
    now.ring.advance();
    if (++now.filled <= kBehind) return;
    ptx::cp_async_wait_group<kBehind>();
    hand_over(now);
  }
  // The stage that was filled first, whose copies of this thread have ended.
  __device__ __forceinline__ void hand_over(Progress& now) const {
    const int slot = (now.ring.slot + Tile::kStages - now.filled--) % Tile::kStages;
    ptx::fence_proxy_async_shared();
    __syncwarp();
    if (lane == 0) ptx::mbarrier_arrive_remote(shared.block.full(slot), 0);
  }

  __device__ __forceinline__ void copy_right(const Progress& now, uint32_t full, const Work& work,
                                             int k0) const {
    const auto& o = shared.adapters.o;
    const int expert = (work.span.weight - o.first_expert) * o.q_rows;
    const uint32_t right = shared.block.right(now.ring.slot);
    const CUtensorMap* q = &shared.block.maps.q;
    ptx::mbarrier_arrive_expect_tx(full, Tile::kRightBytes);
    if constexpr (kMNMajor) {
#pragma unroll
      for (int panel = 0; panel < Tile::kN / 64; ++panel)
        ptx::tma_load_2d(right + panel * Tile::kPanelBytes, q, full, work.at.column + panel * 64,
                         expert + k0);
    } else {
      ptx::tma_load_2d(right, q, full, k0, expert + work.at.column);
    }
  }
};

template <class T, bool kMNMajor, bool kUMNMajor, bool kMasked>
struct OwnWeightsConsumer {
  using Shared = OwnWeightsSm90a<T, kMNMajor, kUMNMajor>;
  using Tile = typename Shared::Tile;
  using Ring = typename Shared::Ring;
  using Work = typename Shared::Work;
  using Consumer = LoraGemmSm90aConsumer<T, Tile, kMNMajor, kMasked, Tile::kK / 16>;
  using Accumulators = typename Consumer::Accumulators;
  using Epilogue = typename Consumer::Epilogue;
  using MaskAhead = std::conditional_t<kMasked, LoraGemmSm90aMaskAhead<T, Tile, PositionedRows>,
                                       typename Consumer::NoMask>;
  static constexpr int kStores = Tile::kSlabRows * 8 / 32;  // of a slab, per lane
  // Of a lane: where Y has its row of each slab's 16, and how many of them are within the tile.
  struct YRows {
    int at[kStores], count;
  };

  const Shared& shared;
  const int index;
  const Consumer consumer{shared.block, index};
  const LoraGemmParams<T>& p = shared.block.p;
  const int lane = consumer.lane, warp_row = consumer.epilogue.first_row({0, 0}, 0);

  __device__ __forceinline__ void consume() const {
    Ring ring;
    Work work = shared.next(shared.block.first_tile);
    MaskAhead ahead = mask_ahead();
    draw_for(ahead, work);
    while (!shared.ends(work)) {
      Work then;
      if (work.span.has_products()) {
        Accumulators acc;
        const YRows rows = compute(acc, ring, work, then, ahead);
        store(acc, rows, work);
      } else {
        store_zeros(work);
        then = shared.after(work);
        draw_for(ahead, then);
      }
      work = then;
    }
  }

  __device__ __forceinline__ MaskAhead mask_ahead() const {
    if constexpr (!kMasked) {
      return {};
    } else {
      return {shared.block, warp_row + lane / 4, lane % 4 * 2, {shared.adapters.o.mask_rows, p.m}};
    }
  }
  __device__ __forceinline__ static void draw_for(MaskAhead& ahead, const Work& work) {
    if constexpr (kMasked) ahead.restart(work.span.begin, work.at.column);
  }

  // As LoraGemmSm90aConsumer::compute; the next tile is looked up while products are in flight.
  __device__ __forceinline__ YRows compute(Accumulators& acc, Ring& ring, const Work& work,
                                           Work& then, MaskAhead& ahead) const {
    typename Consumer::Progress now{ring};
    if constexpr (kMasked) {
      ahead.draw(MaskAhead::kShares);
      multiply_low_rank(acc, now);
      then = shared.after(work);
      consumer.wait_for_products(acc);
      ahead.apply(acc);
      draw_for(ahead, then);
      consumer.multiply_main(acc, now, [&] { ahead.draw(ahead.shares_of_step); });
    } else {
      consumer.multiply_main(acc, now);
      then = shared.after(work);
    }
    const int64_t biases = work.span.weight * shared.adapters.o.bias_stride;
    const auto bias = consumer.epilogue.bias.load(work.at.column, biases);
    const YRows rows = y_rows(work);
    if constexpr (!kMasked) multiply_low_rank(acc, now);
    consumer.epilogue.put_bias(bias);
    consumer.finish(acc, ring, now);
    return rows;
  }

  __device__ __forceinline__ void multiply_low_rank(Accumulators& acc,
                                                    typename Consumer::Progress& now) const {
    const int depth = shared.adapters.depth(), last_term = shared.adapters.last_term();
#pragma unroll 1
    for (int k0 = 0; k0 < depth; k0 += Tile::kK) {
      if (k0 == 0) consumer.scale_for_lo(acc, now, 0);
      if (k0 == last_term) consumer.scale_for_lo(acc, now, kMaxLowRankTerms - 1);
      if (depth - k0 > 16) {
        consumer.template step<Tile::kK / 16, kUMNMajor>(acc, now);
      } else {
        consumer.template step<1, kUMNMajor>(acc, now);
      }
    }
  }

  __device__ __forceinline__ YRows y_rows(const Work& work) const {
    const PositionedRows row_at{shared.adapters.o.y_rows, p.m};
    const int first = warp_row + lane / 8;
    YRows rows;
    rows.count = work.span.count - first;
#pragma unroll
    for (int i = 0; i < kStores; ++i) rows.at[i] = row_at(work.span.begin + first + i * 4);
    return rows;
  }

  // Each warp by itself. A slab is filled again behind the barrier of the other, before which all
  // lanes have read it.
  __device__ __forceinline__ void store(const Accumulators& acc, const YRows& rows,
                                        const Work& work) const {
#pragma unroll
    for (int part = 0; part < Tile::kN / 64; ++part) {
      const uint32_t slab =
          consumer.epilogue.slabs + static_cast<uint32_t>(part % Tile::kSlabs) * Tile::kSlabBytes;
      consumer.epilogue.fill(slab, &acc[0][part * 32], part * 64);
      __syncwarp();
      store_chunks(rows, work.at.column + part * 64, [&](int row) {
        const uint32_t from = slab - shared.block.shared + row_chunk_offset(row, lane % 8);
        return *reinterpret_cast<const uint4*>(ptx::dynamic_shared_memory() + from);
      });
    }
  }
  __device__ __forceinline__ void store_zeros(const Work& work) const {
    const YRows rows = y_rows(work);
#pragma unroll 1
    for (int part = 0; part < Tile::kN / 64; ++part)
      store_chunks(rows, work.at.column + part * 64, [](int /*row*/) { return uint4{}; });
  }
  // Stores the lane's chunks of 16 rows and 64 columns: chunk(row of the 16).
  template <class Chunk>
  __device__ __forceinline__ void store_chunks(const YRows& rows, int column,
                                               const Chunk& chunk) const {
    column += lane % 8 * 8;
#pragma unroll
    for (int i = 0; i < kStores; ++i)
      if (i * 4 < rows.count && column < p.n)
        *reinterpret_cast<uint4*>(p.y + rows.at[i] * p.y_pitch + column) = chunk(lane / 8 + i * 4);
  }
};

// Of the maps there is q's alone.
template <class T, bool kMNMajor, bool kUMNMajor, bool kMasked>
__global__ void __launch_bounds__(OwnWeightsTile::kThreads, 1)
    lora_grouped_gemm_own_weights_sm90a(const __grid_constant__ LoraGemmMaps maps,
                                        const __grid_constant__ LoraOwnWeightsParams<T> o) {
  if constexpr (ptx::kHasSm90a) {
    using Shared = OwnWeightsSm90a<T, kMNMajor, kUMNMajor>;
    const typename Shared::Block block{.maps = maps, .p = o.gemm, .row_pairs = o.row_tile_count};
    if (threadIdx.x == 0) {
      block.init_barriers(OwnWeightsTile::kFills);
      if (o.gemm.k > 0) ptx::prefetch_tensor_map(&maps.q);
    }
    __syncthreads();
    const typename Shared::Adapters adapters{o};
    const Shared shared{block, adapters};
    dispatch_role<OwnWeightsTile>(
        [&](int warp) {
          OwnWeightsProducer<T, kMNMajor, kUMNMajor, kMasked>{shared, warp}.produce();
        },
        [&](int consumer) {
          OwnWeightsConsumer<T, kMNMajor, kUMNMajor, kMasked>{shared, consumer}.consume();
        });
  }
}

// Of dX U is MN-major, of forward K-major; it may be masked.
template <class T, bool kMNMajor, bool kUMNMajor, bool kMasked, class Launch>
void launch_own_weights_tile(const LoraOwnWeightsParams<T>& o, int blocks, Launch& launch) {
  using Tile = OwnWeightsTile;
  const auto kernel = lora_grouped_gemm_own_weights_sm90a<T, kMNMajor, kUMNMajor, kMasked>;
  const LoraGemmParams<T>& p = o.gemm;
  LoraGemmMaps maps{};
  if (p.k > 0) {
    const int before = (o.end_expert - o.first_expert - 1) * o.q_rows;
    maps.q = launch.encode(p.q, before + (kMNMajor ? p.k : p.n), kMNMajor ? p.n : p.k, p.q_pitch,
                           Tile::kRightBoxRows<kMNMajor>);
  }
  Sm90aLaunch config{dim3(1), dim3(1), Tile::kThreads, Tile::kSharedBytes, false};
  config.grid.x = clusters_for(blocks, launch.clusters(kernel, config), {});
  launch(kernel, config, maps, o);
}

template <class T, class Launch>
void launch_own_weights_sm90a(const LoraOwnWeightsParams<T>& o, bool mn_major, bool of_dx,
                              bool masked, int blocks, Launch& launch) {
  const auto with = [&](auto major) {
    if (!of_dx) return launch_own_weights_tile<T, major, false, false>(o, blocks, launch);
    if (!masked) return launch_own_weights_tile<T, major, true, false>(o, blocks, launch);
    launch_own_weights_tile<T, major, true, true>(o, blocks, launch);
  };
  mn_major ? with(std::true_type()) : with(std::false_type());
}

}  // namespace lora_ext::kernel
