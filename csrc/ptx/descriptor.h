// The 64-bit matrix descriptor with which wgmma finds an operand in shared memory (PTX ISA,
// "Matrix descriptor format"). No instruction: pure arithmetic on both targets.
#pragma once

#include <cstdint>

#ifdef __CUDACC__
#define LORA_EXT_HOST_DEVICE_CONSTEXPR __host__ __device__ __forceinline__ constexpr
#else
#define LORA_EXT_HOST_DEVICE_CONSTEXPR constexpr
#endif

namespace lora_ext::ptx {

// Swizzling modes, by the bytes of a swizzled row.
enum class Swizzle { kNone, k32, k64, k128 };

// Bits 13-0: address, 29-16: leading dimension byte offset, 45-32: stride dimension byte offset,
// each in units of 16 bytes; 63-62: swizzling mode (0 none, 1 128-byte, 2 64-byte, 3 32-byte). The
// base offset, bits 51-49, stays 0: tiles start at multiples of their swizzle's repeating pattern.
LORA_EXT_HOST_DEVICE_CONSTEXPR uint64_t matrix_descriptor(uint32_t address, uint32_t leading_bytes,
                                                          uint32_t stride_bytes, Swizzle swizzle) {
  const uint64_t mode = (4 - static_cast<uint64_t>(swizzle)) % 4;
  return ((address & 0x3FFFFu) >> 4) |
         static_cast<uint64_t>((leading_bytes & 0x3FFFFu) >> 4) << 16 |
         static_cast<uint64_t>((stride_bytes & 0x3FFFFu) >> 4) << 32 | mode << 62;
}

}  // namespace lora_ext::ptx
