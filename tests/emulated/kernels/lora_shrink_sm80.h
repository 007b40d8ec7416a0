// The instances of lora_shrink_sm80 and lora_reduce that the tests run.
#pragma once
#include "kernel/lora_reduce.h"
#include "kernel/lora_shrink_sm80.h"

// X(variant, T, MN-major, masked, alignment)
#define LORA_SHRINK_SM80_VARIANTS(X)                                 \
  X(bf16, __nv_bfloat16, false, false, Alignment::kVector)           \
  X(fp16, __half, false, false, Alignment::kVector)                  \
  X(masked_bf16, __nv_bfloat16, false, true, Alignment::kVector)     \
  X(masked_fp16, __half, false, true, Alignment::kVector)            \
  X(masked_element, __nv_bfloat16, false, true, Alignment::kElement) \
  X(ds_bf16, __nv_bfloat16, true, false, Alignment::kVector)         \
  X(ds_fp16, __half, true, false, Alignment::kVector)                \
  X(ds_element, __half, true, false, Alignment::kElement)

// To be used in namespace lora_ext::kernel.
#define LORA_SHRINK_SM80_INSTANCE(T, mn_major, masked, alignment) \
  template __global__ void lora_shrink_sm80<T, mn_major, masked, alignment>(LoraShrinkParams<T>)
#define LORA_REDUCE_INSTANCE(T) template __global__ void lora_reduce<T>(LoraReduceParams<T>)
