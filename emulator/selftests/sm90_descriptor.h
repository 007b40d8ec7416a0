// The 64 bits of a wgmma matrix descriptor, assembled independently of csrc/ptx (PTX ISA, "Matrix
// descriptor format"), and swizzles, independently of the layer.
#pragma once

#include <cstdint>

#include "emulator/copies/swizzle.h"

namespace emulator::selftest {

constexpr Swizzle kSwizzles[] = {Swizzle::kNone, Swizzle::k32, Swizzle::k64, Swizzle::k128};

// The 16-byte chunk at which chunk `chunk` of line `line` lies within that line, as the figures of
// the PTX ISA draw it: lines of 128 bytes in memory, so several narrow lines share a permutation.
inline uint32_t drawn_chunk(uint32_t line, uint32_t chunk, Swizzle mode) {
  const uint32_t chunks[] = {1, 2, 4, 8};  // of a line
  const uint32_t count = chunks[static_cast<uint32_t>(mode)];
  return chunk ^ line * count / 8 % count;
}

inline uint64_t descriptor_bits(uint32_t start, uint32_t leading, uint32_t stride, Swizzle mode) {
  const uint64_t modes[] = {0, 3, 2, 1};
  return uint64_t{start / 16} | uint64_t{leading / 16} << 16 | uint64_t{stride / 16} << 32 |
         modes[static_cast<uint32_t>(mode)] << 62;
}

}  // namespace emulator::selftest
