// Dropout's bits for a tile of lora_gemm on sm_90a, drawn before the product that they mask is
// complete.
//
// An element takes 13 instructions to draw, and 2.4 to mask once its bit is drawn. So bits are
// drawn while the tensor core works on other tiles: with the pingpong schedule before the consumer
// may multiply, with the cooperative schedule a part in each step of the tile before. 4 registers
// hold the bits of 128 accumulators.
//
//   draw_in_step(tile)   some of a tile's bits; the steps of one tile draw all of them
//   finish(tile)         draws the bits that are not drawn yet
//   apply(acc)           mask * accumulators, which hold only T U at this point
#pragma once
#include "kernels/gemm/sm90a/pipeline.h"
#include "kernels/tile/mask.h"

namespace lora_ext::kernel {

// row_at: the row of the mask of each row.
template <class T, class Tile, class Rows = SameRows>
struct LoraGemmSm90aMaskAhead {
  using Block = LoraGemmSm90aBlock<T, Tile>;

  static constexpr int kSharesOfRow = Tile::kN / 32;
  static constexpr int kShares = 2 * Tile::kRowBlocks * kSharesOfRow;
  static constexpr int kWords = kShares / 4;
  static_assert(kShares % 4 == 0);

  const Block& block;
  const int first_row, first_column;  // of this thread, in a tile
  const Rows row_at{};
  const MaskShares shares{block.p.mask};

  // Shares per step of a tile, rounded up, so that none are left after the last step.
  const int shares_of_step = (kShares + block.main_steps - 1) / max(block.main_steps, 1);

  int tile = -1, drawn = 0;
  int row = 0, column = 0;  // of the thread's first element
  // Used as a queue, so that no register is indexed at run time: a share is pushed at the end; the
  // first is in the highest bits once all are drawn.
  uint32_t words[kWords] = {};

  // Restarts for another tile.
  __device__ __forceinline__ void begin(int of_tile) {
    if (tile == of_tile) return;
    const auto at = block.place_of(of_tile);
    restart(at.row, at.column);
    tile = of_tile;
  }
  __device__ __forceinline__ void restart(int at_row, int at_column) {
    row = at_row + first_row, column = at_column + first_column;
    drawn = 0;
  }

  __device__ __forceinline__ void draw(int count) {
    const int end = min(drawn + count, kShares);
#pragma unroll 1
    for (; drawn < end; ++drawn) push(draw_share());
  }

  __device__ __forceinline__ void draw_in_step(int of_tile) {
    begin(of_tile);
    draw(shares_of_step);
  }

  __device__ __forceinline__ void finish(int of_tile) {
    begin(of_tile);
    draw(kShares);
  }

  // The order: rows 0 and 8 of each 64, and shares from left to right.
  __device__ __forceinline__ uint32_t draw_share() const {
    const int of_rows = drawn / kSharesOfRow;
    return shares.draw(row_at(row + of_rows / 2 * 64 + of_rows % 2 * 8),
                       column + drawn % kSharesOfRow * 32);
  }

  __device__ __forceinline__ void push(uint32_t share) {
#pragma unroll
    for (int i = 0; i + 1 < kWords; ++i) words[i] = words[i] << 8 | words[i + 1] >> 24;
    words[kWords - 1] = words[kWords - 1] << 8 | share;
  }

  __device__ __forceinline__ void apply(float (&acc)[Tile::kRowBlocks][Tile::kN / 2]) const {
    const float scale = shares.mask.keep_scale;
#pragma unroll
    for (int share = 0; share < kShares; ++share) {
      const int of_rows = share / kSharesOfRow, first = share % kSharesOfRow * 4;
#pragma unroll
      for (int i = 0; i < 8; ++i) {
        float& value = acc[of_rows / 2][(first + i / 2) * 4 + of_rows % 2 * 2 + i % 2];
        const bool kept = words[share / 4] >> (31 - share % 4 * 8 - i) & 1;
        value = kept ? value * scale : 0.f;
      }
    }
  }
};

}  // namespace lora_ext::kernel
