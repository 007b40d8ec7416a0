// The dropout mask inside a kernel: the draws of philox.h, in the order of a fragment's elements.
#pragma once
#include <vector_types.h>  // __device__, which is empty for a host compiler

#include "common/philox.h"
#include "ptx/integer.h"

namespace lora_ext::kernel {

LORA_EXT_HOST_DEVICE bool Mask::aligned_to_draws() const { return col_offset % 32 == 0; }

// A draw by an instruction of its own for each product: without the additions of zero that ptxas
// makes of C++'s, 84 instructions for 92 in wgrad.
struct MultiplyWide {
  __device__ __forceinline__ philox::Product operator()(uint32_t a, uint32_t b) const {
    philox::Product product;
    ptx::mul_wide(product.low, product.high, a, b);
    return product;
  }
};
__device__ __forceinline__ philox::Words draw_words(uint64_t seed, uint64_t row, uint32_t group) {
  return philox::draw(seed, row, group, MultiplyWide{});
}

// The 16 bits that decide one element, in the low half. The word is selected by masks, since an
// array indexed at run time would be in local memory. Products are C++'s: eight draws at a time by
// MultiplyWide need more registers than wgrad has.
__device__ __forceinline__ uint32_t draw_for_element(uint64_t seed, uint64_t row, uint64_t column) {
  const philox::Words words = philox::draw(seed, row, philox::group_of(column));
  uint32_t picked = 0;
#pragma unroll
  for (uint32_t word = 0; word < 4; ++word)
    picked |= words.w[word] & (0u - static_cast<uint32_t>(column % 32 / 8 == word));
  return picked >> column % 2 * 16;
}

// Dropout on the fragments of mma.sync, between ldmatrix and the product: zeroes those of two
// neighbouring elements that are dropped; `draws` holds their two 16-bit draws.
__device__ __forceinline__ void keep_or_drop(uint32_t& pair, uint32_t draws, const Mask& mask) {
  const bool low = (draws & 0xFFFF) < mask.keep_count;
  const bool high = draws >> 16 < mask.keep_count;
  pair &= static_cast<uint32_t>(low) * 0xFFFFu | static_cast<uint32_t>(high) * 0xFFFF0000u;
}

// Dropout's mask in shares: a share is the 8 elements of a row that a lane holds in four
// neighbouring blocks of m16n8, two columns in each. Its 8 bits have the first element in the
// highest bit.
struct MaskShares {
  const Mask& mask;
  const uint64_t seed = static_cast<uint64_t>(*mask.seed);

  // Draws the share whose first element is (row, column) of what the kernel masks.
  __device__ __forceinline__ uint32_t draw(int row, int column) const {
    const auto at_row = static_cast<uint64_t>(mask.row_offset + row);
    const auto at_column = static_cast<uint64_t>(mask.col_offset + column);
    return mask.aligned_to_draws() ? draw_aligned(at_row, at_column) : draw_each(at_row, at_column);
  }

  // If columns are counted from a multiple of 32, one draw decides all elements, in their order.
  __device__ __forceinline__ uint32_t draw_aligned(uint64_t row, uint64_t column) const {
    const philox::Words words = draw_words(seed, row, philox::group_of(column));
    uint32_t bits = 0;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      bits = with_bit(bits, words.w[i] & 0xFFFF);
      bits = with_bit(bits, words.w[i] >> 16);
    }
    return bits;
  }

  // For any other offset: one draw per element.
  __device__ __forceinline__ uint32_t draw_each(uint64_t row, uint64_t column) const {
    uint32_t bits = 0;
#pragma unroll 1
    for (uint32_t i = 0; i < 8; ++i)
      bits = with_bit(bits, draw_for_element(seed, row, column + i / 2 * 8 + i % 2) & 0xFFFF);
    return bits;
  }

  // Below keep_count the difference is negative: its sign bit is shifted in, by one instruction.
  __device__ __forceinline__ uint32_t with_bit(uint32_t bits, uint32_t draw) const {
    return bits << 1 | (draw - mask.keep_count) >> 31;
  }
};

}  // namespace lora_ext::kernel
