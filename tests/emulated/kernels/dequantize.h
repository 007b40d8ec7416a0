// All instances of the dequantisation kernels.
#pragma once
#include "emulated/kernels/instance.h"
#include "kernels/dequantize/formats.h"

// X(variant, T)
#define DEQUANTIZE_VARIANTS(X) \
  X(fp32, float)               \
  X(bf16, __nv_bfloat16)       \
  X(fp16, __half)

#define DEQUANTIZE_INSTANCES(variant, T)                                   \
  INSTANCE(dequantize_4bit<T>(Dequantize4bitParams))                       \
  INSTANCE(dequantize_8bit<T, Dequantize8bitParams>(Dequantize8bitParams)) \
  INSTANCE(dequantize_8bit<T, DequantizeFloat8Params>(DequantizeFloat8Params))
namespace lora_ext::kernel {
DEQUANTIZE_VARIANTS(DEQUANTIZE_INSTANCES)
}  // namespace lora_ext::kernel
