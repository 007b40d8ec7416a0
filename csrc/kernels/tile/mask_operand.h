// The dropout mask as an operand. Plain C++, for code that launches kernels; mask.h draws the mask.
#pragma once

#include <cstdint>

#include "common/host_device.h"

namespace lora_ext::kernel {

// The mask of philox.h at (row_offset + row, col_offset + column) of the masked matrix.
struct Mask {
  const int64_t* seed;  // on the device, so that the replay of a graph reads a new one
  int64_t row_offset, col_offset;
  uint32_t keep_count;
  float keep_scale;

  // Whether one draw decides exactly the 8 elements of a row that a lane holds in four fragments of
  // 8 columns, side by side, that begin at a multiple of 32. Defined in mask.h.
  LORA_EXT_HOST_DEVICE bool in_step() const;
};

}  // namespace lora_ext::kernel
