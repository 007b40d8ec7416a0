// Shared by the roles of lora_gemm on sm_90a: pointers into shared memory, the ring of stages, the
// order of the tiles, and the set-up and end of a block.
#pragma once
#include <cuda.h>

#include "kernels/gemm/params.h"
#include "kernels/gemm/sm90a/tile.h"
#include "ptx/mbarrier.h"
#include "ptx/sync.h"
#include "ptx/thread.h"
#include "ptx/tma.h"

namespace lora_ext::kernel {

// The tensor maps of the operands of LoraGemmParams, with boxes 64 elements wide and the 128-byte
// swizzle. With k = 0, p and q are never used.
struct LoraGemmMaps {
  CUtensorMap p;  // [m, k], boxes of Tile::kLeftBoxRows
  CUtensorMap q;  // [n, k] or [k, n], boxes of Tile::kRightBoxRows
  struct {
    CUtensorMap t, u;  // as p and q, with the rank in k's place
  } low_rank[kMaxLowRankTerms];
  CUtensorMap y;  // [m, n], boxes of Tile::kStoreBoxRows
};

// A position in the ring of stages. Two mbarriers guard each stage: full, completed when its bytes
// have arrived, and empty, completed when its readers have released it. `parity` is that of the
// phase of full to wait for. Stages are empty at first, so empty is one phase behind.
template <int kStages>
struct StageRing {
  int slot = 0;
  uint32_t parity = 0;

  __device__ __forceinline__ void advance() {
    ++slot;
    if (slot == kStages) {
      slot = 0;
      parity ^= 1;
    }
  }
  // Skips the stages of a tile that the other consumer takes.
  __device__ __forceinline__ void skip(int steps) {
    slot += steps;
    parity ^= static_cast<uint32_t>(slot / kStages) & 1;
    slot %= kStages;
  }
};

template <class T, class Tile>
struct LoraGemmSm90aBlock {
  using Ring = StageRing<Tile::kStages>;

  const LoraGemmMaps& maps;
  const LoraGemmParams<T>& p;
  const uint32_t shared = ptx::shared_address(ptx::dynamic_shared_memory());
  const uint32_t rank = ptx::cluster_rank();
  const int first_tile = static_cast<int>(blockIdx.x) / Tile::kClusterSize;
  const int tile_stride = static_cast<int>(gridDim.x) / Tile::kClusterSize;  // number of clusters
  const int row_pairs = (p.m + Tile::kPairM - 1) / Tile::kPairM;
  const int column_tiles = (p.n + Tile::kN - 1) / Tile::kN;
  const int tiles = row_pairs * column_tiles;  // pairs of tiles, one tile per block of a cluster
  const int main_steps = (p.k + Tile::kK - 1) / Tile::kK;
  const int steps_per_term = (p.rank + Tile::kK - 1) / Tile::kK;
  const int steps = main_steps + steps_per_term * p.terms;

  __device__ __forceinline__ uint32_t full(int slot) const {
    return shared + Tile::kFull + 8 * static_cast<uint32_t>(slot);
  }
  __device__ __forceinline__ uint32_t empty(int slot) const {
    return shared + Tile::kEmpty + 8 * static_cast<uint32_t>(slot);
  }
  __device__ __forceinline__ uint32_t left(int slot) const {
    return shared + static_cast<uint32_t>(slot) * Tile::kStageBytes;
  }
  __device__ __forceinline__ uint32_t right(int slot) const {
    return left(slot) + Tile::kLeftBytes;
  }

  // Order of the tiles: one that keeps eight pairs of row blocks of P and about as many columns of
  // Q in L2.
  struct Place {
    int row, column;  // first row and column of the block's tile
  };
  __device__ __forceinline__ Place place_of(int tile) const {
    constexpr int kGroup = 8;
    const int first = tile / (kGroup * column_tiles) * kGroup;
    const int height = row_pairs - first >= kGroup ? kGroup : row_pairs - first;
    const int within = tile - first * column_tiles;
    return {(first + within % height) * Tile::kPairM + static_cast<int>(rank) * Tile::kM,
            within / height * Tile::kN};
  }

  __device__ __forceinline__ void set_up() const {
    // Readers are in both blocks: what this block multicasts arrives in both.
    constexpr int kReleases = Tile::kClusterSize * Tile::kReaders;
    if (threadIdx.x == 0) {
      for (int slot = 0; slot < Tile::kStages; ++slot) {
        ptx::mbarrier_init(full(slot), 1u);
        ptx::mbarrier_init(empty(slot), kReleases);
      }
      ptx::fence_mbarrier_init();
      ptx::prefetch_tensor_map(&maps.low_rank[0].t);
      ptx::prefetch_tensor_map(&maps.low_rank[0].u);
      ptx::prefetch_tensor_map(&maps.y);
      if (p.k > 0) {
        ptx::prefetch_tensor_map(&maps.p);
        ptx::prefetch_tensor_map(&maps.q);
      }
    }
    // No thread may arrive at a barrier of the peer, or multicast to it, before it is initialised.
    // The fence publishes the initialisation, and nothing else has been written.
    ptx::cluster_arrive_relaxed();
    ptx::cluster_wait();
  }

  // A block must not exit while arrivals of its peer at its barriers may be in flight: so the
  // arrival here is a release, before which a thread's remote arrivals are performed.
  __device__ __forceinline__ void sync_before_exit() const {
    ptx::cluster_arrive();
    ptx::cluster_wait();
  }
};

}  // namespace lora_ext::kernel
