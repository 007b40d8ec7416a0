// Shared-memory swizzles of TMA and wgmma: exclusive-or on absolute shared addresses.
//
// Address bits [4, 4+b) ^= bits [7, 7+b) with b = 1, 2, 3 for the modes 32B, 64B and 128B, so that
// chunks of 16 bytes stay whole (PTX ISA, "Swizzling modes" of the tensor copies).
#pragma once

#include <cstdint>

namespace emulator {

// Values of CUtensorMapSwizzle.
enum class Swizzle : uint32_t { kNone = 0, k32 = 1, k64 = 2, k128 = 3 };

// Bytes of one row of the pattern: the widest inner box, and the span of one row of a K-major tile.
constexpr uint32_t swizzle_width(Swizzle mode) { return 16u << static_cast<uint32_t>(mode); }

// Bytes after which the pattern repeats; a tile that starts on a multiple has a base offset of 0.
constexpr uint32_t swizzle_period(Swizzle mode) {
  return mode == Swizzle::kNone ? 16 : 128u << static_cast<uint32_t>(mode);
}

constexpr uint32_t swizzle(uint32_t address, Swizzle mode) {
  const uint32_t chunk_bits = swizzle_width(mode) - 16;  // 0x00, 0x10, 0x30, 0x70
  return address ^ ((address >> 3) & chunk_bits);
}

constexpr const char* swizzle_name(Swizzle mode) {
  constexpr const char* kNames[] = {"no swizzle", "32B swizzle", "64B swizzle", "128B swizzle"};
  return kNames[static_cast<uint32_t>(mode)];
}

}  // namespace emulator
