// The rows of a call by adapter, on the host: those of one adapter form a segment.
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

// Segments in the order of adapters; without those that have no rows, and without rows that have no
// adapter. `order` says which row each sorted row is; the rows of one segment ascend.
struct Segments {
  std::vector<Segment> list;
  std::vector<int32_t> order;
};

// Reads index, offs and ranks, which on a GPU waits for the device. Throws where one of them names
// an adapter, a row or a rank that does not exist. `op` is the Python function's name.
Segments segments_of(const char* op, const Update& update, int64_t rows);

}  // namespace lora_ext
