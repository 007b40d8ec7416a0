// The operands of wgmma: matrix descriptors, which are pure arithmetic on both targets, and lists
// of accumulator registers. No instruction, and nothing included of either target.
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

// The 64-bit matrix descriptor with which wgmma finds an operand in shared memory (PTX ISA, "Matrix
// descriptor format"): bits 13-0 address, 29-16 leading dimension byte offset, 45-32 stride
// dimension byte offset, each in units of 16 bytes; 63-62 swizzling mode (0 none, 1 128-byte, 2
// 64-byte, 3 32-byte). The base offset, bits 51-49, stays 0: tiles start at multiples of their
// swizzle's repeating pattern.
LORA_EXT_HOST_DEVICE_CONSTEXPR uint64_t matrix_descriptor(uint32_t address, uint32_t leading_bytes,
                                                          uint32_t stride_bytes, Swizzle swizzle) {
  const uint64_t mode = (4 - static_cast<uint64_t>(swizzle)) % 4;
  return ((address & 0x3FFFFu) >> 4) |
         static_cast<uint64_t>((leading_bytes & 0x3FFFFu) >> 4) << 16 |
         static_cast<uint64_t>((stride_bytes & 0x3FFFFu) >> 4) << 32 | mode << 62;
}

}  // namespace lora_ext::ptx

// The operand lists of wgmma.mma_async, whose m64nNk16 has N / 2 accumulator registers per thread.
// Inline asm accepts only string literals, so the lists are macros, each made of a shorter one.
//
//     LORA_EXT_REGISTERS_<n>     the text "%0, %1, ..., %<n - 1>"
//     LORA_EXT_ACCUMULATORS_<n>  the read-write operands d[0] .. d[n - 1]

#define LORA_EXT_REGISTERS_32                                            \
  "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15" \
  ", %16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"
#define LORA_EXT_REGISTERS_96                                                        \
  LORA_EXT_REGISTERS_32                                                              \
  ", %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47" \
  ", %48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63" \
  ", %64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79" \
  ", %80, %81, %82, %83, %84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95"
#define LORA_EXT_REGISTERS_128                                                                   \
  LORA_EXT_REGISTERS_96                                                                          \
  ", %96, %97, %98, %99, %100, %101, %102, %103, %104, %105, %106, %107, %108, %109, %110, %111" \
  ", %112, %113, %114, %115, %116, %117, %118, %119, %120, %121, %122, %123, %124, %125, %126, " \
  "%127"

#define LORA_EXT_D4(i) "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3])
#define LORA_EXT_D16(i) LORA_EXT_D4(i), LORA_EXT_D4(i + 4), LORA_EXT_D4(i + 8), LORA_EXT_D4(i + 12)
#define LORA_EXT_D32(i) LORA_EXT_D16(i), LORA_EXT_D16(i + 16)
#define LORA_EXT_ACCUMULATORS_32 LORA_EXT_D32(0)
#define LORA_EXT_ACCUMULATORS_96 LORA_EXT_ACCUMULATORS_32, LORA_EXT_D32(32), LORA_EXT_D32(64)
#define LORA_EXT_ACCUMULATORS_128 LORA_EXT_ACCUMULATORS_96, LORA_EXT_D32(96)
