// The rows of a call: in blocks, so that temporaries have a few rows only; and sorted by adapter, on
// the host, where the rows of one adapter form a segment.
#pragma once

#include <ATen/core/Tensor.h>

#include <algorithm>
#include <cstdint>
#include <vector>

#include "common/bounds.h"
#include "common/call.h"

namespace lora_ext {

struct Segment {
  int64_t adapter;
  int64_t begin, count;  // among the sorted rows
  int64_t rank;
};

// Segments in the order of adapters. Adapters without rows have no segment; rows without an adapter
// are in none. `order` maps each sorted row to the row of the call; within a segment they ascend.
struct Segments {
  c10::SmallVector<Segment, 1> list;
  std::vector<int32_t> order;
};

// Reads index, offs and ranks; on a GPU this waits for the device. Throws if one of them names an
// adapter, a row or a rank that does not exist. `op` is the name of the Python function.
Segments segments_of(const char* op, const Update& update, int64_t rows);

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
