// Loops over blocks of rows, so that temporaries have a few rows only.
#pragma once

#include <ATen/core/Tensor.h>

#include <algorithm>
#include <cstdint>

#include "common/bounds.h"

namespace lora_ext {

// The number of rows whose copy in `dtype` stays below a bound, but at least 16. The bound is 2 MiB
// on the CPU, which stays in a core's cache, and 256 MiB elsewhere, so that most calls are one
// block.
inline int64_t rows_of_block(int64_t columns, at::ScalarType dtype, at::DeviceType device) {
  const int64_t bytes = device == at::kCPU ? int64_t{1} << 21 : kWideBlockBytes;
  const int64_t row_bytes =
      std::max<int64_t>(1, columns * static_cast<int64_t>(c10::elementSize(dtype)));
  return std::max<int64_t>(16, bytes / row_bytes);
}

// Calls visit(first_row, row_count) for blocks of the rows of x. The temporaries have `columns`
// columns in `dtype`.
template <class Visit>
void for_row_blocks(const at::Tensor& x, int64_t columns, at::ScalarType dtype,
                    const Visit& visit) {
  const int64_t rows = x.size(0);
  const int64_t block = rows_of_block(columns, dtype, x.device().type());
  for (int64_t row = 0; row < rows; row += block) visit(row, std::min(block, rows - row));
}

}  // namespace lora_ext
