// The instances of the kernels that dequantise, all that there are.
#pragma once
#include "kernel/dequantize_4bit.h"
#include "kernel/dequantize_8bit.h"

// X(variant, T)
#define DEQUANTIZE_VARIANTS(X) \
  X(fp32, float)               \
  X(bf16, __nv_bfloat16)       \
  X(fp16, __half)

// To be used in namespace lora_ext::kernel, with "extern template" or "template".
#define DEQUANTIZE_INSTANCES(declare, T)                            \
  declare __global__ void dequantize_4bit<T>(Dequantize4bitParams); \
  declare __global__ void dequantize_8bit<T>(Dequantize8bitParams);
