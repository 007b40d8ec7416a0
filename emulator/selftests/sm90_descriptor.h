// The 64 bits of a wgmma matrix descriptor, assembled independently of csrc/ptx (PTX ISA, "Matrix
// descriptor format").
#pragma once

#include <cstdint>

#include "emulator/copies/swizzle.h"

namespace emulator::selftest {

inline uint64_t descriptor_bits(uint32_t start, uint32_t leading, uint32_t stride, Swizzle mode) {
  const uint64_t modes[] = {0, 3, 2, 1};
  return uint64_t{start / 16} | uint64_t{leading / 16} << 16 | uint64_t{stride / 16} << 32 |
         modes[static_cast<uint32_t>(mode)] << 62;
}

}  // namespace emulator::selftest
