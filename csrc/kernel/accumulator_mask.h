// The dropout mask on accumulators of mma.m16n8 or wgmma: of each block of 8 columns a lane holds
// four, of its row and of the eighth after it, two neighbouring columns each.
#pragma once
#include "kernel/mask.h"

namespace lora_ext::kernel {

template <int kColumnBlocks>
struct AccumulatorMask {
  const Mask& parameters;

  // mask * acc, [kColumnBlocks][4]; acc[0] is the element (upper, column), acc[2] (lower, column).
  __device__ __forceinline__ void apply(float* acc, int upper, int lower, int column) const {
    const auto seed = static_cast<uint64_t>(*parameters.seed);
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const auto at_row = static_cast<uint64_t>(parameters.row_offset + (half ? lower : upper));
      const auto at_column = static_cast<uint64_t>(parameters.col_offset + column);
      if (parameters.in_step()) {
        mask_in_step(acc + half * 2, seed, at_row, at_column);
      } else {
        mask_each(acc + half * 2, seed, at_row, at_column);
      }
    }
  }

  __device__ __forceinline__ void keep_or_drop(float& value, uint32_t draw) const {
    value = (draw & 0xFFFF) < parameters.keep_count ? value * parameters.keep_scale : 0.f;
  }

  // Where columns count from a multiple of 32, one draw decides a lane's 8 elements of a row in
  // four blocks side by side, in the order in which the lane holds them.
  __device__ __forceinline__ void mask_in_step(float* acc, uint64_t seed, uint64_t row,
                                               uint64_t column) const {
#pragma unroll
    for (int j = 0; j < kColumnBlocks; j += 4) {
      const philox::Words words = philox::draw(seed, row, philox::group_of(column + j * 8));
#pragma unroll
      for (int word = 0; word < 4; ++word) {
        keep_or_drop(acc[(j + word) * 4], words.w[word]);
        keep_or_drop(acc[(j + word) * 4 + 1], words.w[word] >> 16);
      }
    }
  }

  // Any other offset: a draw for each element, one at a time. Unrolled, they would spill.
  __device__ __forceinline__ void mask_each(float* acc, uint64_t seed, uint64_t row,
                                            uint64_t column) const {
    static_assert(kColumnBlocks * 2 <= 64, "a bit for each element of the row");
    uint64_t kept = 0;
#pragma unroll 1
    for (int i = 0; i < kColumnBlocks * 2; ++i) {
      const uint32_t draw = draw_for_element(seed, row, column + i / 2 * 8 + i % 2);
      kept |= static_cast<uint64_t>((draw & 0xFFFF) < parameters.keep_count) << i;
    }
#pragma unroll
    for (int i = 0; i < kColumnBlocks * 2; ++i) {
      float& value = acc[i / 2 * 4 + i % 2];
      value = kept >> i & 1 ? value * parameters.keep_scale : 0.f;
    }
  }
};

}  // namespace lora_ext::kernel
