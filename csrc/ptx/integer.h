// Integer instructions that the compiler does not choose by itself.
#pragma once
#include "ptx/target.h"

namespace lora_ext::ptx {

// mul.wide.u32 (every sm): both halves of a product. Of a product of 64 bits in C++, which is
// shifted, ptxas (13.0) makes an addition of zero besides. Not volatile: equal products may be one.
LORA_EXT_DEVICE void mul_wide(uint32_t& low, uint32_t& high, uint32_t a, uint32_t b) {
#ifdef __CUDACC__
  asm("{\n"
      ".reg .b64 product;\n"
      "mul.wide.u32 product, %2, %3;\n"
      "mov.b64 {%0, %1}, product;\n"
      "}"
      : "=r"(low), "=r"(high)
      : "r"(a), "r"(b));
#else
  const uint64_t product = uint64_t{a} * b;
  low = static_cast<uint32_t>(product), high = static_cast<uint32_t>(product >> 32);
#endif
}

}  // namespace lora_ext::ptx
