// The dropout mask inside a kernel: the draws of philox.h, in the order of a fragment's elements.
#pragma once
#include <vector_types.h>  // __device__, which is empty for a host compiler

#include "common/philox.h"
#include "kernel/mask_operand.h"

namespace lora_ext::kernel {

LORA_EXT_HOST_DEVICE bool Mask::in_step() const { return col_offset % 32 == 0; }

// The 16 bits that decide one element, in the low half. The word is selected by masks, since an
// array indexed at run time would be in local memory.
__device__ __forceinline__ uint32_t draw_for_element(uint64_t seed, uint64_t row, uint64_t column) {
  const philox::Words words = philox::draw(seed, row, philox::group_of(column));
  uint32_t picked = 0;
#pragma unroll
  for (uint32_t word = 0; word < 4; ++word)
    picked |= words.w[word] & (0u - static_cast<uint32_t>(column % 32 / 8 == word));
  return picked >> column % 2 * 16;
}

}  // namespace lora_ext::kernel
