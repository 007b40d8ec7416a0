// How lora_decode (kernels/decode/work.h) divides its work among the blocks of its grid. Tiles of S
// are cut into chunks of two steps, 64 along k each, tiles of Y into units of one. Each block has
// consecutive chunks and then consecutive units, in all as many steps as any other block, or one
// more: a block has two units less per chunk.
#pragma once

#include "common/host_device.h"

namespace lora_ext::plan {

struct DecodeShares {
  // One step per chunk would double the partial sums, and no block would end sooner.
  static constexpr int kChunk = 2;
  // Least units of a block, unless there is one block: fewer would not fill its pipeline of copies.
  static constexpr int kMinUnits = 4;
  // Keeps all numbers here below 2^31: W would have 16 TiB.
  static constexpr int kMaxUnits = 1 << 30, kMaxBlocks = 1 << 15;

  int tiles, s_tiles, steps;  // of Y, of S, and of each tile along k
  int blocks;

  // Where blocks begin among `count` items: block * count / blocks, without 64-bit arithmetic.
  struct Run {
    int each, left, blocks;
    LORA_EXT_HOST_DEVICE int first(int block) const {
      return block * each +
             static_cast<int>(static_cast<unsigned>(block) * static_cast<unsigned>(left) /
                              static_cast<unsigned>(blocks));
    }
  };
  LORA_EXT_HOST_DEVICE Run run_of(int count) const {
    return {count / blocks, count % blocks, blocks};
  }

  // Of a tile of S.
  LORA_EXT_HOST_DEVICE int chunks() const { return (steps + kChunk - 1) / kChunk; }
  LORA_EXT_HOST_DEVICE int all_chunks() const { return s_tiles * chunks(); }
  LORA_EXT_HOST_DEVICE int units() const { return tiles * steps; }
  LORA_EXT_HOST_DEVICE int first_chunk(int block) const {
    return run_of(all_chunks()).first(block);
  }
  LORA_EXT_HOST_DEVICE int first_unit(int block) const {
    return run_of(units() + kChunk * all_chunks()).first(block) - kChunk * first_chunk(block);
  }

  LORA_EXT_HOST_DEVICE int block_of(int unit) const {
    const Run work = run_of(units() + kChunk * all_chunks()), s = run_of(all_chunks());
    const auto first = [&](int block) { return work.first(block) - kChunk * s.first(block); };
    return block_with(unit, units(), first);
  }
  LORA_EXT_HOST_DEVICE int block_of_chunk(int chunk) const {
    const Run s = run_of(all_chunks());
    return block_with(chunk, all_chunks(), [&](int block) { return s.first(block); });
  }
  // The block that has item `at` of `count` units or chunks; first(block) is its first item.
  // Searches from the block that would have it if all blocks had the same number.
  template <class First>
  LORA_EXT_HOST_DEVICE int block_with(int at, int count, const First& first) const {
    int block = guess(at, count);
    while (first(block) > at) --block;
    while (first(block + 1) <= at) ++block;
    return block;
  }
  LORA_EXT_HOST_DEVICE int guess(int at, int count) const {
    const int block = static_cast<int>(static_cast<float>(at) * static_cast<float>(blocks) /
                                       static_cast<float>(count));
    return block < blocks ? block : blocks - 1;
  }

  // The blocks that have a part of a tile of Y. Along all units a new part begins with a tile or
  // with a block, so tile + block is a unique slot.
  LORA_EXT_HOST_DEVICE int first_block(int tile) const { return block_of(tile * steps); }
  LORA_EXT_HOST_DEVICE int last_block(int tile) const { return block_of((tile + 1) * steps - 1); }
  LORA_EXT_HOST_DEVICE int slots() const { return tiles + blocks; }

  // Parts of a tile of S: its chunks, if each has its own block; else as those of Y.
  LORA_EXT_HOST_DEVICE bool chunks_apart() const { return all_chunks() <= blocks; }
  struct Parts {
    int slot, count;  // the slot of the first part; the others follow
  };
  LORA_EXT_HOST_DEVICE Parts s_parts(int tile) const {
    if (chunks_apart()) return {tile * chunks(), chunks()};
    const int first = block_of_chunk(tile * chunks());
    return {tile + first, block_of_chunk((tile + 1) * chunks() - 1) - first + 1};
  }
  LORA_EXT_HOST_DEVICE int s_slot(int tile, int chunk, int block) const {
    return chunks_apart() ? tile * chunks() + chunk : tile + block;
  }
  // Enough for as many tiles of S or fewer.
  LORA_EXT_HOST_DEVICE int s_slots() const {
    return chunks_apart() ? all_chunks() : s_tiles + blocks;
  }
};

}  // namespace lora_ext::plan
