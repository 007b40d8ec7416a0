// The instances of lora_decode, all that there are.
#pragma once
#include "emulated/kernels/instance.h"
#include "kernels/decode/kernel.h"

// X(variant, T, the factors' type, rows at most)
#define LORA_DECODE_VARIANTS(X)                \
  X(bf16_8, __nv_bfloat16, __nv_bfloat16, 8)   \
  X(fp16_16, __half, __half, 16)               \
  X(bf16_32, __nv_bfloat16, __nv_bfloat16, 32) \
  X(fp16_64, __half, __half, 64)               \
  X(float_bf16_8, __nv_bfloat16, float, 8)     \
  X(float_fp16_16, __half, float, 16)          \
  X(float_fp16_32, __half, float, 32)          \
  X(float_bf16_64, __nv_bfloat16, float, 64)   \
  X(fp16_8, __half, __half, 8)                 \
  X(bf16_16, __nv_bfloat16, __nv_bfloat16, 16) \
  X(fp16_32, __half, __half, 32)               \
  X(bf16_64, __nv_bfloat16, __nv_bfloat16, 64) \
  X(float_fp16_8, __half, float, 8)            \
  X(float_bf16_16, __nv_bfloat16, float, 16)   \
  X(float_bf16_32, __nv_bfloat16, float, 32)   \
  X(float_fp16_64, __half, float, 64)

#define LORA_DECODE_INSTANCES(variant, T, F, batch) \
  INSTANCE(lora_decode_sm80<T, F, batch>(LoraDecodeParams<T>))
namespace lora_ext::kernel {
LORA_DECODE_VARIANTS(LORA_DECODE_INSTANCES)
}  // namespace lora_ext::kernel
