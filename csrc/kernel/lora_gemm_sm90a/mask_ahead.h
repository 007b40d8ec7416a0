// Dropout's bits of a tile of lora_gemm on sm_90a, drawn before the product that they mask is
// there.
//
// An element takes 13 instructions to draw, and 2.4 to mask once its bit is there. So bits are
// drawn while the tensor core works for others: in pingpong schedules before a consumer's turn, in
// cooperative ones a share in each step of the tile before; 4 registers hold those of 128
// accumulators.
//
//   draw_in_step(tile)   some of a tile's bits: all of them in the steps of another tile
//   finish(tile)         those that are not drawn yet
//   apply(acc)           mask * accumulators, which hold T U alone
#pragma once
#include "kernel/lora_gemm_sm90a/pipeline.h"

namespace lora_ext::kernel {

template <class T, class Tile>
struct LoraGemmSm90aMaskAhead {
  using Block = LoraGemmSm90aBlock<T, Tile>;

  // One draw decides a share: a thread's 8 elements of a row, in four blocks of 8 columns.
  static constexpr int kSharesOfRow = Tile::kN / 32;
  static constexpr int kShares = 2 * Tile::kRowBlocks * kSharesOfRow;
  static constexpr int kWords = kShares / 4;
  static_assert(kShares % 4 == 0);

  const Block& block;
  const int first_row, first_column;  // of the thread, in a tile
  const Mask& mask = block.p.mask;
  const uint64_t seed = static_cast<uint64_t>(*mask.seed);

  // Of a tile's steps: so many that the last one finds none left.
  const int shares_of_step = (kShares + block.main_steps - 1) / max(block.main_steps, 1);

  int tile = -1, drawn = 0;
  uint64_t row = 0, column = 0;  // of the masked matrix
  // As a queue, so that no register is chosen at run time: a share comes in at the end, the first
  // lies highest once all are there.
  uint32_t words[kWords] = {};

  // From here on bits are those of this tile.
  __device__ __forceinline__ void begin(int of_tile) {
    if (tile == of_tile) return;
    const auto at = block.place_of(of_tile);
    row = static_cast<uint64_t>(mask.row_offset + at.row + first_row);
    column = static_cast<uint64_t>(mask.col_offset + at.column + first_column);
    tile = of_tile;
    drawn = 0;
  }

  __device__ __forceinline__ void draw(int shares) {
    const int end = min(drawn + shares, kShares);
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

  // Rows 0 and 8 of each 64, and shares from left to right.
  __device__ __forceinline__ uint32_t draw_share() const {
    const int of_rows = drawn / kSharesOfRow;
    const uint64_t at_row = row + static_cast<uint64_t>(of_rows / 2 * 64 + of_rows % 2 * 8);
    const uint64_t at_column = column + static_cast<uint64_t>(drawn % kSharesOfRow * 32);
    return mask.in_step() ? share_in_step(at_row, at_column) : share_of_each(at_row, at_column);
  }

  // Where columns count from a multiple of 32, the draw's halves are the lane's elements in the
  // order in which it holds them.
  __device__ __forceinline__ uint32_t share_in_step(uint64_t at_row, uint64_t at_column) const {
    const philox::Words words_of = philox::draw(seed, at_row, philox::group_of(at_column));
    uint32_t bits = 0;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      bits = with_bit(bits, words_of.w[i] & 0xFFFF);
      bits = with_bit(bits, words_of.w[i] >> 16);
    }
    return bits;
  }

  // Any other offset: a draw for each element.
  __device__ __forceinline__ uint32_t share_of_each(uint64_t at_row, uint64_t at_column) const {
    uint32_t bits = 0;
#pragma unroll 1
    for (uint32_t i = 0; i < 8; ++i) {
      const uint32_t draw = draw_for_element(seed, at_row, at_column + i / 2 * 8 + i % 2);
      bits = with_bit(bits, draw & 0xFFFF);
    }
    return bits;
  }

  // Below keep_count the difference is negative, and its sign is shifted in: one instruction.
  __device__ __forceinline__ uint32_t with_bit(uint32_t bits, uint32_t draw) const {
    return bits << 1 | (draw - mask.keep_count) >> 31;
  }

  __device__ __forceinline__ void push(uint32_t share) {
#pragma unroll
    for (int i = 0; i + 1 < kWords; ++i) words[i] = words[i] << 8 | words[i + 1] >> 24;
    words[kWords - 1] = words[kWords - 1] << 8 | share;
  }

  __device__ __forceinline__ void apply(float (&acc)[Tile::kRowBlocks][Tile::kN / 2]) const {
    const float scale = mask.keep_scale;
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
