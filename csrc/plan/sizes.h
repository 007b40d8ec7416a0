// Arithmetic of tiles, steps and elements.
#pragma once

#include <cstdint>

namespace lora_ext::plan {

constexpr int64_t kStep = 64;  // depth of one step of all main loops

inline int64_t blocks_of(int64_t count, int64_t size) { return (count + size - 1) / size; }
inline int64_t rounded_up(int64_t count, int64_t size) { return blocks_of(count, size) * size; }
inline double area(int64_t rows, int64_t columns) {
  return static_cast<double>(rows) * static_cast<double>(columns);
}

}  // namespace lora_ext::plan
