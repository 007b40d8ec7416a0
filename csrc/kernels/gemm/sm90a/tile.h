// Tiles of lora_gemm on sm_90a: their shape, their division among consumers, and the layout of a
// block's shared memory.
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

#include <cstdint>

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
  template <bool kMNMajor, int kColumns = kN>
  static constexpr int kRightBoxRows = (kMNMajor ? kK : kColumns) / kClusterSize;
};

using LoraGemmSm90aTile128x256 = LoraGemmSm90aTile<256, 4, Sm90aSchedule::kCooperative>;
using LoraGemmSm90aTile128x192Pingpong = LoraGemmSm90aTile<192, 4, Sm90aSchedule::kPingpong>;

}  // namespace lora_ext::kernel
