// Matrix descriptors of wgmma: from the 64 bits to the shared address of an element.
//
// PTX ISA, "Asynchronous warpgroup level matrix shared memory layout". Elements have 16 bits, and a
// unit below is a 16-byte chunk of 8 of them. With W the swizzle width (16 bytes for none):
//
//   K-major   8 rows of W bytes lie one after another; from 8 rows to the next `stride` bytes.
//             Unswizzled, from one chunk along K to the next `leading` bytes.
//   MN-major  8 lines (k) of W bytes lie one after another; from W bytes along MN to the next
//             `leading` bytes, from 8 k to the next `stride` bytes. Unswizzled, the two swap.
//
// The swizzle then acts on the absolute address. `row` is an index along M of A or along N of B.
#pragma once

#include <cstdint>
#include <string>

#include "emulator/copies/swizzle.h"

namespace emulator {

// Which dimension of an operand is contiguous in shared memory.
enum class Major { kK, kMN };

constexpr uint32_t kWgmmaK = 16;  // elements along K of one wgmma with 16-bit operands

struct MatrixDescriptor {
  uint32_t start;    // bytes
  uint32_t leading;  // bytes
  uint32_t stride;   // bytes
  uint32_t base_offset;
  Swizzle swizzle;
  bool reserved_bits;  // any bit set that the format leaves unused
};

inline MatrixDescriptor decode_descriptor(uint64_t bits) {
  constexpr Swizzle kModes[] = {Swizzle::kNone, Swizzle::k128, Swizzle::k64, Swizzle::k32};
  constexpr uint64_t kUsed =
      0x3FFFull | 0x3FFFull << 16 | 0x3FFFull << 32 | 7ull << 49 | 3ull << 62;
  const auto field = [bits](int shift) {
    return static_cast<uint32_t>(bits >> shift & 0x3FFF) << 4;
  };
  return {field(0),           field(16),           field(32), static_cast<uint32_t>(bits >> 49 & 7),
          kModes[bits >> 62], (bits & ~kUsed) != 0};
}

// Shared address of element (row, k). An aligned group of 8 elements along the major dimension lies
// in one 16-byte chunk.
inline uint32_t element_address(const MatrixDescriptor& d, Major major, uint32_t row, uint32_t k) {
  const uint32_t width = swizzle_width(d.swizzle);
  const bool swizzled = d.swizzle != Swizzle::kNone;
  uint32_t address = d.start;
  if (major == Major::kK) {
    address += row / 8 * d.stride + row % 8 * width;
    address += swizzled ? k * 2 : k / 8 * d.leading + k % 8 * 2;
  } else if (swizzled) {
    address += row * 2 % width + row * 2 / width * d.leading;
    address += k % 8 * width + k / 8 * d.stride;
  } else {
    address += row % 8 * 2 + row / 8 * d.stride;
    address += k % 8 * 16 + k / 8 * d.leading;
  }
  return swizzle(address, d.swizzle);
}

// What is wrong with a descriptor of `rows` x 16 elements, or "". The first two rules are of the
// PTX ISA. The last two follow from a base offset of 0: the pattern starts at a multiple of its
// period, so the tile starts within the pattern's first line and keeps to multiples of the period.
inline std::string descriptor_fault(const MatrixDescriptor& d, Major major, uint32_t rows) {
  if (d.reserved_bits) return "sets bits outside the descriptor's fields";
  if (d.base_offset != 0) {
    return "has base offset " + std::to_string(d.base_offset) +
           "; this layer runs 0 only: align the tile to the swizzle's period";
  }
  if (d.swizzle == Swizzle::kNone) return "";
  const uint32_t width = swizzle_width(d.swizzle), period = swizzle_period(d.swizzle);
  const std::string mode = swizzle_name(d.swizzle);
  const uint32_t line_bytes = (major == Major::kK ? kWgmmaK : rows) * 2;
  const uint32_t offset = d.start % period;
  if (offset >= width || (offset != 0 && offset + line_bytes > width)) {
    return "starts at " + std::to_string(offset) + " bytes into the pattern of the " + mode +
           "; expected a start in its first " + std::to_string(width) + " of " +
           std::to_string(period) + " bytes that leaves room for " + std::to_string(line_bytes) +
           " bytes of a line";
  }
  const bool strides_groups = major == Major::kMN || rows > 8;
  if (strides_groups && d.stride % period != 0) {
    return "has stride " + std::to_string(d.stride) + " bytes; expected a multiple of " +
           std::to_string(period) + " for the " + mode;
  }
  if (major == Major::kMN && line_bytes > width && d.leading % period != 0) {
    return "has leading offset " + std::to_string(d.leading) + " bytes; expected a multiple of " +
           std::to_string(period) + " for the " + mode;
  }
  return "";
}

}  // namespace emulator
