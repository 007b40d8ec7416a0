// Dropout on the fragments of mma.sync, between ldmatrix and the product.
#pragma once
#include "kernel/mask.h"

namespace lora_ext::kernel {

// Zeroes those of two neighbouring elements that are dropped; `draws` holds their two 16-bit draws.
__device__ __forceinline__ void keep_or_drop(uint32_t& pair, uint32_t draws, const Mask& mask) {
  const bool low = (draws & 0xFFFF) < mask.keep_count;
  const bool high = draws >> 16 < mask.keep_count;
  pair &= static_cast<uint32_t>(low) * 0xFFFFu | static_cast<uint32_t>(high) * 0xFFFF0000u;
}

}  // namespace lora_ext::kernel
