// Passes over rows that make temporaries of a few rows at a time.
#pragma once

#include <c10/core/ScalarType.h>

#include <algorithm>
#include <cstdint>

namespace lora_ext {

// Calls visit(first_row, row_count) over blocks whose copy in `dtype` stays under 2 MiB, but of at
// least 16 rows.
template <class Visit>
void for_row_blocks(int64_t rows, int64_t columns, at::ScalarType dtype, const Visit& visit) {
  constexpr int64_t kBlockBytes = 2 << 20;
  const int64_t row_bytes =
      std::max<int64_t>(1, columns * static_cast<int64_t>(c10::elementSize(dtype)));
  const int64_t block = std::max<int64_t>(16, kBlockBytes / row_bytes);
  for (int64_t row = 0; row < rows; row += block) visit(row, std::min(block, rows - row));
}

}  // namespace lora_ext
