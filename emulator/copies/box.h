// A box of a tensor on its way between global and shared memory: what of it lies inside of the
// tensor, where its chunks lie, and what a tensor copy demands of both.
#pragma once
#include <algorithm>
#include <cstdint>

#include "emulator/copies/tensor_map.h"
#include "emulator/counts/counters.h"
#include "emulator/machine/fail.h"

namespace emulator {

inline constexpr uint32_t kChunk = 16;  // bytes that a swizzle keeps together, a copy's unit
inline constexpr uint32_t kSharedAlignment = 128;  // PTX ISA: of a tensor copy's shared address
inline constexpr uint32_t kPatternLines = 8;

// A box of a tensor: which elements of its rows lie inside.
struct Box {
  TensorMap map;
  int64_t x, y;

  // Columns [first, last) of the box that lie inside the tensor; empty if none does.
  uint32_t first_column() const {
    return static_cast<uint32_t>(std::clamp<int64_t>(-x, 0, map.box_width));
  }
  uint32_t last_column() const {
    const int64_t inside = static_cast<int64_t>(map.width) - x;
    return static_cast<uint32_t>(std::clamp<int64_t>(inside, first_column(), map.box_width));
  }
  bool row_inside(uint32_t row) const {
    return y + row >= 0 && y + row < static_cast<int64_t>(map.height) &&
           first_column() < last_column();
  }
  uint32_t inside_bytes() const { return (last_column() - first_column()) * map.element_bytes; }
  // A store writes whole chunks: also what a row's last one has beyond the tensor's width.
  uint32_t stored_bytes() const { return (inside_bytes() + kChunk - 1) / kChunk * kChunk; }
  // Address of the first column inside.
  uint8_t* global_row(uint32_t row) const {
    return map.base + (y + row) * static_cast<int64_t>(map.pitch) +
           (x + first_column()) * map.element_bytes;
  }
};

// The box's row `row` in shared memory: calls f(pointer to a 16-byte chunk, offset in the row).
template <typename F>
void for_each_chunk(const TensorMap& map, unsigned char* shared, uint32_t offset, uint32_t row,
                    F&& f) {
  const uint32_t row_offset = offset + row * map.box_row_bytes();
  for (uint32_t column = 0; column < map.box_row_bytes(); column += kChunk) {
    f(shared + swizzle(row_offset + column, map.swizzle), column);
  }
}

inline void count_box(const Box& box, GlobalAccess kind) {
  const bool stores = kind == GlobalAccess::TmaStore;
  for (uint32_t row = 0; row < box.map.box_height; ++row) {
    if (box.row_inside(row)) count_global(kind, stores ? box.stored_bytes() : box.inside_bytes());
  }
}

inline Box make_box(const CUtensorMap* map, int32_t x, int32_t y, uint32_t offset,
                    const char* what) {
  const Box box{decode_tensor_map(map, what), x, y};
  const TensorMap& m = box.map;
  // A box's address in global memory is 16-byte aligned (CUDA Programming Guide, tensor copies), also
  // where its corner lies outside: a card raises an illegal instruction.
  if (x * static_cast<int64_t>(m.element_bytes) % kChunk != 0) {
    fail(ErrorKind::Misuse,
         "%s: x = %d, elements of %u bytes; expected a multiple of %u bytes: cp.async.bulk.tensor "
         "takes boxes at 16-byte aligned global addresses",
         what, x, m.element_bytes, kChunk);
  }
  if (m.swizzle == Swizzle::kNone) return box;
  if (m.box_row_bytes() != swizzle_width(m.swizzle)) {
    fail(
        ErrorKind::Misuse,
        "%s: rows of %u bytes under the %s; the layout of narrower rows is not documented, so this "
        "layer takes boxes of the full %u bytes only",
        what, m.box_row_bytes(), swizzle_name(m.swizzle), swizzle_width(m.swizzle));
  }
  // Our rule, stricter than the PTX ISA's 128 bytes: wgmma's base offset is 0, so tiles of more
  // than one pattern start with it.
  const uint32_t period = swizzle_period(m.swizzle);
  if (m.box_height > kPatternLines && offset % period != 0) {
    fail(ErrorKind::Misuse, "%s: shared address 0x%x; expected a multiple of %u for the %s", what,
         offset, period, swizzle_name(m.swizzle));
  }
  return box;
}

}  // namespace emulator
