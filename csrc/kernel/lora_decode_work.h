// The work of each block of lora_decode, in order: chunks of S, then steps of Y ("units"). All of
// it follows from the grid and the table, so equal calls have equal sums.
#pragma once
#include "kernel/lora_decode.h"
#include "plan/decode_shares.h"
#include "ptx/target.h"

namespace lora_ext::kernel {

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
