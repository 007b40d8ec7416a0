// lora_decode: the LoRA linear of few rows in one launch, each row with its own adapter, or none.
//
//     Y = X W^T + bias + s_g (X A_g^T) B_g^T            S = X A_g^T       T = s_g S
//
// W is most of what is read, and it is read once. So the operands change sides: rows of W fill the
// 16 of mma.sync's tile, the batch its 8. A product is cut into "units", 64 along k of a tile of
// W's rows, and every block takes as many of them one after the other, wherever tiles end: all SMs
// read for as long (plan/decode_shares.h). What a block has of a tile leaves as a partial sum. Who
// comes last to a tile adds its sums, in the order of k, and finishes it: nobody waits for anybody,
// so that the grid ends however many of its blocks are resident.
//
// S is made in the same way before, its rows of A in tiles as those of W are, by blocks that then
// have so much less of Y. Who comes last to the last tile of S comes to every tile of Y as one more
// part of it.
#pragma once

#include <cstdint>

#include "kernel/lora_grouped.h"

namespace lora_ext::kernel {

template <class T>
struct LoraDecodeParams {
  const T* x;        // [m, k]; as w in rows of 16-byte chunks
  const T* w;        // [n, k]
  const void* bias;  // [n], in float or T; or null
  T* y;              // [m, n]
  float* s;          // [m, most_rank]: of each row as many as its adapter has ranks; or null
  int64_t x_pitch, w_pitch, y_pitch;
  int m, n, k;
  bool float_bias;

  const int* index;  // [m], the adapter of each row; what names none is none. Null: 0 for all
  int groups;        // adapters
  int most_rank;
  LoraGroupedFactors factors;  // ranks null: all have the largest
  const float* scalings;       // [groups], or null:
  float scaling;               // of all

  float* sums;    // [DecodeShares::slots()] of a tile's elements (plan/decode_shares.h)
  float* s_sums;  // [s_slots()] likewise
  T* t;           // [m, t_pitch], hi and, with factors in float, behind it lo; width each
  int t_pitch, width;
  // Zero at launch, and again after it, so that the replay of a graph finds them so: the parts that
  // have come to each tile of Y, to each of S, and tiles to S.
  uint32_t* arrivals;    // [tiles]
  uint32_t* s_arrivals;  // [tiles of S]
  uint32_t* s_tiles;     // [1]
};

// A tile of kRows of W, 16 a warp, and up to kBatch rows of X, in steps of 64 along k.
//
// Up to 16 rows two blocks an SM have four stages of 8 KiB each in flight. More rows take wider
// tiles, one an SM: X is read once for each tile, and partial sums are as many as blocks.
template <int kBatch_>
struct LoraDecodeTile {
  static constexpr int kBatch = kBatch_;
  static constexpr int kK = 64;
  static constexpr int kRows = kBatch <= 16 ? 64 : 128;
  static constexpr int kStages = kBatch <= 16 ? 5 : 4;
  static constexpr int kResident = kBatch <= 16 ? 2 : 1;  // blocks an SM
  static constexpr int kWarps = kRows / 16, kThreads = 32 * kWarps;
  static constexpr int kBlocks = kBatch / 8;  // of mma.sync, along the batch
  static constexpr int kElements = kRows * kBatch;

  static constexpr uint32_t kWeightBytes = kRows * kK * 2;
  static constexpr uint32_t kStageBytes = kWeightBytes + kBatch * kK * 2;
  static constexpr uint32_t kTable = kStages * kStageBytes;
  // Behind the ring: LoraDecodeTable.
  static constexpr uint32_t kTableBytes = kBatch * 36 + 12 + kWarps * 4;
  static constexpr uint32_t kSharedBytes = kTable + kTableBytes;
};
static_assert(LoraDecodeTile<64>::kSharedBytes <= 99 * 1024, "what sm_86 gives to a block");

}  // namespace lora_ext::kernel
