// The producer of lora_gemm on sm_90a: one thread of a block fills the ring of stages by TMA.
//
// A stage holds 64 along k of the block's own rows of P or T, and of columns of Q or U that the two
// blocks of a cluster share: each loads half and multicasts it to both. Elements outside of an
// operand arrive as zeros, and count as bytes all the same.
#pragma once
#include "kernels/gemm/sm90a/pipeline.h"
#include "ptx/sync.h"

namespace lora_ext::kernel {

template <class T, class Tile, bool kMNMajor, bool kMasked>
struct LoraGemmSm90aProducer {
  using Block = LoraGemmSm90aBlock<T, Tile>;
  using Ring = typename Block::Ring;
  using Place = typename Block::Place;

  const Block& block;
  const LoraGemmMaps& maps = block.maps;

  // Tile by tile, in the order in which the consumers take the steps.
  __device__ __forceinline__ void produce() const {
    Ring ring;
    bool t_is_written = false;
    for (int tile = block.first_tile; tile < block.tiles; tile += block.tile_stride) {
      const Place at = block.place_of(tile);
      if constexpr (!kMasked) load_main_product(ring, at);
      if (!t_is_written) wait_for_t();
      t_is_written = true;
      load_low_rank_product(ring, at);
      if constexpr (kMasked) load_main_product(ring, at);
    }
  }

  // Waits for T, which the kernel before writes and which nothing else here depends on. That kernel
  // may still run. It used ordinary stores; T is read through the async proxy.
  //
  // Once every block has T, lora_wgrad, which reads it, too, may start on SMs that the last tiles
  // leave idle: its blocks do not fit beside a block of this grid.
  __device__ __forceinline__ void wait_for_t() const {
    ptx::griddepcontrol_wait();
    ptx::fence_proxy_async_global();
    if (block.p.trigger_dependents) launch_dependents();
  }

  // A dependent may read what the grids before this one wrote: the fence passes it on.
  static __device__ __forceinline__ void launch_dependents() {
    ptx::fence_acq_rel_gpu();
    ptx::griddepcontrol_launch_dependents();
  }

  __device__ __forceinline__ void load_main_product(Ring& ring, const Place& at) const {
    const int steps = block.main_steps;
    for (int step = 0; step < steps; ++step) load(ring, &maps.p, &maps.q, step * Tile::kK, at);
  }

  __device__ __forceinline__ void load_low_rank_product(Ring& ring, const Place& at) const {
    const int terms = block.p.terms, steps = block.steps_per_term;
    for (int term = 0; term < terms; ++term) {
      const auto& factors = maps.low_rank[term];
      for (int step = 0; step < steps; ++step)
        load(ring, &factors.t, &factors.u, step * Tile::kK, at);
    }
  }

  // Waits until one stage is empty and fills it.
  __device__ __forceinline__ void load(Ring& ring, const CUtensorMap* left,
                                       const CUtensorMap* right, int k0, const Place& at) const {
    ptx::mbarrier_wait(block.empty(ring.slot), ring.parity ^ 1);
    ptx::mbarrier_arrive_expect_tx(block.full(ring.slot), Tile::kStageBytes);
    ptx::tma_load_2d(block.left(ring.slot), left, block.full(ring.slot), k0, at.row);
    multicast_half(ring, right, k0, at.column);
    ring.advance();
  }

  // Half of the right operand: columns of Y if K-major, else rows of k in every 64-column panel.
  __device__ __forceinline__ void multicast_half(const Ring& ring, const CUtensorMap* right, int k0,
                                                 int column) const {
    constexpr int kHalf = Tile::template kRightBoxRows<kMNMajor>;
    constexpr uint16_t kBoth = 0b11;
    const int first = static_cast<int>(block.rank) * kHalf;
    const uint32_t half = block.right(ring.slot) + block.rank * kHalf * Tile::kRowBytes;
    if constexpr (kMNMajor) {
#pragma unroll
      for (int panel = 0; panel < Tile::kN / 64; ++panel) {
        ptx::tma_load_2d_multicast(half + panel * Tile::kPanelBytes, right, block.full(ring.slot),
                                   column + panel * 64, k0 + first, kBoth);
      }
    } else {
      ptx::tma_load_2d_multicast(half, right, block.full(ring.slot), k0, column + first, kBoth);
    }
  }
};

}  // namespace lora_ext::kernel
