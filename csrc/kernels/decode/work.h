// lora_decode: the LoRA linear of few rows in one launch; each row has its own adapter, or none.
//
//     Y = X W^T + bias + s_g (X A_g^T) B_g^T            S = X A_g^T       T = s_g S
//
// Most of the bytes read are W's, and W is read once. So the operands are swapped: rows of W fill
// the 16 rows of mma.sync's tile, the batch its 8 columns. A tile is a number of rows of W; its
// product takes steps of 64 along k ("units" in the code). Steps are numbered over all tiles and
// divided evenly among the blocks, without regard to where tiles end (stream-k), so that all SMs
// read for the same time (kernels/plan/decode_shares.h). A block writes a partial sum for each tile
// it has steps of. The block that arrives last at a tile adds its partial sums, in the order of k,
// and finishes it. No block waits for another, so the grid ends however many of its blocks are
// resident.
//
// S is computed in the same way, before Y: rows of A form tiles as rows of W do, and the blocks
// that compute them get that much less of Y. The block that finishes the last tile of S then
// arrives at every tile of Y once more, for S.
#pragma once
#include <cstdint>

#include "kernels/lora_grouped.h"
#include "kernels/plan/decode_shares.h"
#include "ptx/target.h"

namespace lora_ext::kernel {

template <class T>
struct LoraDecodeParams {
  const T* x;        // [m, k]; x and w have rows of 16-byte chunks
  const T* w;        // [n, k]
  const void* bias;  // [n], in float or T; may be null
  T* y;              // [m, n]
  float* s;          // [m, max_rank], of which each row's rank is written; may be null
  int64_t x_pitch, w_pitch, y_pitch;
  int m, n, k;
  bool float_bias;

  const int* index;  // [m], the adapter of each row; other values mean none. Null: 0 for all
  int groups;        // number of adapters
  int max_rank;
  LoraGroupedFactors factors;  // if ranks is null, all have the largest rank
  const float* scalings;       // [groups]; if null, `scaling` is that of all
  float scaling;

  float* sums;    // [DecodeShares::slots()], each of a tile's elements
  float* s_sums;  // [s_slots()], likewise
  T* t;           // [m, t_pitch]: hi in `width` columns and, with factors in float, lo in as many
  int t_pitch, width;
  // Zero at launch, and reset to zero by the kernel, so that a graph can be replayed: the number of
  // arrivals at each tile of Y, at each tile of S, and the number of tiles of S that are complete,
  // which is not counted where there is one.
  uint32_t* arrivals;    // [tiles]
  uint32_t* s_arrivals;  // [tiles of S]
  uint32_t* s_tiles;     // [1]
};

// A tile of kRows rows of W, 16 per warp, and up to kBatch rows of X, in steps of 64 along k.
//
// Up to 16 rows, two blocks per SM have four stages of 8 KiB each in flight. More rows take larger
// tiles, one block per SM: X is read once per tile, and partial sums are as many as blocks.
template <int kBatch_>
struct LoraDecodeTile {
  static constexpr int kBatch = kBatch_;
  static constexpr int kK = 64;
  static constexpr int kRows = kBatch <= 16 ? 64 : 128;
  static constexpr int kStages = kBatch <= 16 ? 5 : 4;
  static constexpr int kResident = kBatch <= 16 ? 2 : 1;  // blocks per SM
  static constexpr int kWarps = kRows / 16, kThreads = 32 * kWarps;
  static constexpr int kBlocks = kBatch / 8;  // n-blocks of mma.sync
  static constexpr int kElements = kRows * kBatch;

  static constexpr uint32_t kWeightBytes = kRows * kK * 2;
  static constexpr uint32_t kStageBytes = kWeightBytes + kBatch * kK * 2;
  static constexpr uint32_t kTable = kStages * kStageBytes;
  // LoraDecodeTable follows the ring in shared memory.
  static constexpr uint32_t kTableBytes = kBatch * 36 + 12 + kWarps * 4;
  static constexpr uint32_t kSharedBytes = kTable + kTableBytes;
};
static_assert(LoraDecodeTile<64>::kSharedBytes <= 99 * 1024, "what sm_86 gives to a block");

// The work of each block of lora_decode, in order: chunks of S, then steps of Y ("units"). All of
// it follows from the grid and the table, so equal calls have equal sums.

template <class T, class Tile>
struct LoraDecodeWork {
  using Shares = plan::DecodeShares;
  const Shares shares;

  // The grid has at most as many blocks as DecodeShares asks for.
  __device__ __forceinline__ LoraDecodeWork(const LoraDecodeParams<T>& p, int row_blocks)
      : shares{(p.n + Tile::kRows - 1) / Tile::kRows,
               (row_blocks * 16 + Tile::kRows - 1) / Tile::kRows, (p.k + Tile::kK - 1) / Tile::kK,
               static_cast<int>(gridDim.x)} {}

  // Number of arrivals at a tile of Y, including that of S if there is any.
  __device__ __forceinline__ uint32_t parts_of(int tile) const {
    return static_cast<uint32_t>(shares.last_block(tile) - shares.first_block(tile) + 1 +
                                 (shares.s_tiles > 0));
  }

  // The current position of a block's loads or of its products.
  struct Walk {
    int next_chunk, end_chunk;  // over all tiles of S
    int next_unit, end_unit;    // over all of Y
    bool of_s;
    int tile, step, end;
  };
  __device__ __forceinline__ Walk begin() const {
    const int block = static_cast<int>(blockIdx.x);
    return {shares.first_chunk(block),
            shares.first_chunk(block + 1),
            shares.first_unit(block),
            shares.first_unit(block + 1),
            false,
            0,
            0,
            0};
  }
  // Advances to the next part of a tile; returns whether there is one.
  __device__ __forceinline__ bool next(Walk& walk) const {
    walk.of_s = walk.next_chunk < walk.end_chunk;
    if (walk.of_s) {
      const int chunks = shares.chunks(), chunk = walk.next_chunk % chunks;
      const int count = min(chunks - chunk, walk.end_chunk - walk.next_chunk);
      walk.tile = walk.next_chunk / chunks;
      walk.step = chunk * Shares::kChunk;
      walk.end = min((chunk + count) * Shares::kChunk, shares.steps);
      walk.next_chunk += count;
      return true;
    }
    if (walk.next_unit == walk.end_unit) return false;
    walk.tile = walk.next_unit / shares.steps;
    walk.step = walk.next_unit % shares.steps;
    walk.end = min(shares.steps, walk.step + walk.end_unit - walk.next_unit);
    walk.next_unit += walk.end - walk.step;
    return true;
  }
  // The slot of the partial sum of a part of S that is multiplied to its end.
  __device__ __forceinline__ int s_slot(const Walk& walk) const {
    return shares.s_slot(walk.tile, (walk.end - 1) / Shares::kChunk, static_cast<int>(blockIdx.x));
  }
};

}  // namespace lora_ext::kernel
