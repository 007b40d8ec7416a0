// What each block of lora_decode does, in which order: chunks of S, then units of Y. All of it
// follows from the grid and the table, so equal calls have equal sums.
#pragma once
#include "kernel/lora_decode.h"
#include "ptx/target.h"

namespace lora_ext::kernel {

template <class T, class Tile>
struct LoraDecodeWork {
  const int tiles, steps;      // of Y, and along k
  const int s_tiles, s_steps;  // of S, and along k in a chunk
  const int chunks = (steps + s_steps - 1) / s_steps;
  const int64_t units = static_cast<int64_t>(tiles) * steps;
  const int64_t blocks = gridDim.x;

  __device__ __forceinline__ LoraDecodeWork(const LoraDecodeParams<T>& p, int row_blocks)
      : tiles((p.n + Tile::kRows - 1) / Tile::kRows),
        steps((p.k + Tile::kK - 1) / Tile::kK),
        s_tiles((row_blocks * 16 + Tile::kRows - 1) / Tile::kRows),
        s_steps(p.s_steps) {}

  // Of a block. The grid has at most as many blocks as there are units, so each has one.
  __device__ __forceinline__ int64_t first_unit(int64_t block) const {
    return block * units / blocks;
  }
  __device__ __forceinline__ int block_of(int64_t unit) const {
    // A block of the grid. NOLINTNEXTLINE(custom-cut-to-32-bits)
    return static_cast<int>(((unit + 1) * blocks - 1) / units);
  }
  // The blocks that have a part of a tile.
  __device__ __forceinline__ int first_block(int tile) const {
    return block_of(static_cast<int64_t>(tile) * steps);
  }
  __device__ __forceinline__ int last_block(int tile) const {
    return block_of(static_cast<int64_t>(tile + 1) * steps - 1);
  }
  // Of a block's part of a tile. Along all units a new part begins with a tile or with a block.
  __device__ __forceinline__ int64_t slot(int tile, int block) const {
    return static_cast<int64_t>(tile) + block;
  }
  __device__ __forceinline__ int64_t s_slot(int tile, int chunk) const {
    return static_cast<int64_t>(tile) * chunks + chunk;
  }
  __device__ __forceinline__ uint32_t parts_of(int tile) const {
    return static_cast<uint32_t>(last_block(tile) - first_block(tile) + 1 + (s_tiles > 0));
  }

  // Where the loads or the products of a block are.
  struct Walk {
    int next_chunk;  // of S, over all tiles
    int64_t next_unit;
    bool of_s;
    int tile, step, end;
  };
  __device__ __forceinline__ Walk begin() const {
    return {static_cast<int>(blockIdx.x), first_unit(blockIdx.x), false, 0, 0, 0};
  }
  // On to the next part of a tile; whether there is one.
  __device__ __forceinline__ bool next(Walk& walk) const {
    if (walk.next_chunk < s_tiles * chunks) {
      walk.of_s = true;
      walk.tile = walk.next_chunk / chunks, walk.step = walk.next_chunk % chunks * s_steps;
      walk.end = min(walk.step + s_steps, steps);
      walk.next_chunk += static_cast<int>(gridDim.x);
      return true;
    }
    const int64_t left = first_unit(int64_t{blockIdx.x} + 1) - walk.next_unit;
    if (left == 0) return false;
    walk.of_s = false;
    // Tiles and steps of ints. NOLINTBEGIN(custom-cut-to-32-bits)
    walk.tile = static_cast<int>(walk.next_unit / steps);
    walk.step = static_cast<int>(walk.next_unit % steps);
    walk.end = static_cast<int>(min(int64_t{steps}, walk.step + left));
    // NOLINTEND(custom-cut-to-32-bits)
    walk.next_unit += walk.end - walk.step;
    return true;
  }
};

}  // namespace lora_ext::kernel
