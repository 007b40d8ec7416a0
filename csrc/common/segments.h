// The rows of a call sorted by adapter, on the host: the rows of one adapter form a segment.
#pragma once

#include <cstdint>
#include <vector>

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
  std::vector<Segment> list;
  std::vector<int32_t> order;
};

// Reads index, offs and ranks; on a GPU this waits for the device. Throws if one of them names an
// adapter, a row or a rank that does not exist. `op` is the name of the Python function.
Segments segments_of(const char* op, const Update& update, int64_t rows);

}  // namespace lora_ext
