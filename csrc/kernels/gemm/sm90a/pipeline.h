// Shared by the roles of lora_gemm on sm_90a: the shape of the tiles, their order and their
// division among consumers; the layout of a block's shared memory, and the ring of stages in it;
// the set-up and end of a block.
//
//   tile of Y, 128 x kN        stages of the ring, kStages of them       staging of Y
//
//     kN columns               left  128 x 64   P or T                   of each consumer warp two
//    +----------+              right kN x 64    Q or U                   slabs of 16 x 64: one is
//    |   128    |              (K-major) or 64 x kN as panels of         stored while the other is
//    |   rows   |              64 columns (MN-major)                     filled; of each consumer a
//    +----------+                                                        row of the bias
//
// A row of a stage or slab is 64 elements = 128 bytes = the width of the 128-byte swizzle.
#pragma once
#include <cuda.h>

#include <cstdint>

#include "kernels/gemm/params.h"
#include "ptx/mbarrier.h"
#include "ptx/sync.h"
#include "ptx/thread.h"
#include "ptx/tma.h"

namespace lora_ext::kernel {

// How the two consumer warpgroups divide the tiles.
enum class Sm90aSchedule {
  kCooperative,  // each computes 64 rows of every tile
  kPingpong,     // each computes every other tile: one stores while the other multiplies
};

template <int kN_, int kStages_, Sm90aSchedule kSchedule_>
struct LoraGemmSm90aTile {
  static constexpr int kM = 128, kN = kN_, kK = 64, kStages = kStages_;
  static constexpr bool kPingpong = kSchedule_ == Sm90aSchedule::kPingpong;

  // The blocks of a cluster, one below the other, share their tile of Q: each loads half for both.
  static constexpr int kClusterSize = 2, kPairM = kClusterSize * kM;

  static constexpr int kWarpgroup = 128, kConsumers = 2;
  static constexpr int kThreads = (1 + kConsumers) * kWarpgroup;  // the producer comes first
  static constexpr int kConsumerM = kPingpong ? kM : kM / kConsumers;
  static constexpr int kRowsApart = kM - kConsumerM;         // between the consumers' rows
  static constexpr int kRowBlocks = kConsumerM / 64;         // a wgmma makes 64 rows
  static constexpr int kAccumulators = kRowBlocks * kN / 2;  // per thread
  // Number of warps of a block that read a stage, each of which arrives at its empty barrier.
  static constexpr int kReaders = (kPingpong ? 1 : kConsumers) * 4;

  // A thread is launched with 168 registers, 65,536 / 384 rounded down to a multiple of 8. The
  // producer releases what it does not need: 128 x 40 + 256 x 232 = 64,512.
  static constexpr int kProducerRegisters = 40, kConsumerRegisters = 232;
  static_assert(kWarpgroup * (kProducerRegisters + kConsumers * kConsumerRegisters) <= 65536);

  static constexpr uint32_t kRowBytes = kK * 2;
  static constexpr uint32_t kLeftBytes = kM * kRowBytes, kRightBytes = kN * kRowBytes;
  static constexpr uint32_t kStageBytes = kLeftBytes + kRightBytes;
  static constexpr uint32_t kPanelBytes = kK * kRowBytes;  // MN-major: 64 of k x 64 columns
  static constexpr int kSlabRows = 16, kSlabs = 2;         // per warp
  static constexpr uint32_t kSlabBytes = kSlabRows * kRowBytes;
  // Rounded up, so that every thread of a consumer loads the same number.
  static constexpr int kBiasColumns = (kN + kWarpgroup - 1) / kWarpgroup * kWarpgroup;

  static constexpr uint32_t kStaging = kStages * kStageBytes;
  static constexpr uint32_t kBias = kStaging + kConsumers * 4 * kSlabs * kSlabBytes;
  static constexpr uint32_t kFull = kBias + kConsumers * kBiasColumns * 4;  // mbarriers
  static constexpr uint32_t kEmpty = kFull + 8 * kStages;
  static constexpr uint32_t kSharedBytes = kEmpty + 8 * kStages;

  static_assert(kSharedBytes <= 227 * 1024, "what sm_90 gives to a block");
  static_assert(kLeftBytes % 1024 == 0 && kRightBytes % 2048 == 0 && kSlabBytes % 1024 == 0,
                "tiles and their halves repeat the swizzle's pattern of 1024 bytes");
  static_assert(kN % 64 == 0 && kN <= 256, "panels and slabs of 64 columns; a wgmma's widest");
  static_assert(kAccumulators <= 192, "of 232 registers a thread");
  static_assert(kRowBlocks * (kN / 64) % kSlabs == 0,
                "a tile begins with the slab used longest ago");

  // TMA boxes are 64 elements wide; these are the rows of each operand's box.
  static constexpr int kLeftBoxRows = kM, kStoreBoxRows = kSlabRows;
  template <bool kMNMajor>
  static constexpr int kRightBoxRows = (kMNMajor ? kK : kN) / kClusterSize;
};

using LoraGemmSm90aTile128x256 = LoraGemmSm90aTile<256, 4, Sm90aSchedule::kCooperative>;
using LoraGemmSm90aTile128x192Pingpong = LoraGemmSm90aTile<192, 4, Sm90aSchedule::kPingpong>;

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

  // One thread; so many arrivals fill a stage.
  __device__ __forceinline__ void init_barriers(uint32_t fills) const {
    // Readers are in all blocks: what this block multicasts arrives in all.
    constexpr int kReleases = Tile::kClusterSize * Tile::kReaders;
    for (int slot = 0; slot < Tile::kStages; ++slot) {
      ptx::mbarrier_init(full(slot), fills);
      ptx::mbarrier_init(empty(slot), kReleases);
    }
    ptx::fence_mbarrier_init();
  }

  __device__ __forceinline__ void set_up() const {
    if (threadIdx.x == 0) {
      init_barriers(1u);
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
