// The instances of lora_grouped_wgrad and lora_grouped_reduce_wgrad that the tests run.
#pragma once
#include "kernel/lora_grouped_reduce_wgrad.h"
#include "kernel/lora_grouped_wgrad.h"

// X(variant, T, the factors' type, masked, alignment)
#define LORA_GROUPED_WGRAD_VARIANTS(X)                                   \
  X(bf16, __nv_bfloat16, __nv_bfloat16, false, Alignment::kVector)       \
  X(fp16, __half, __half, false, Alignment::kVector)                     \
  X(float_bf16, __nv_bfloat16, float, false, Alignment::kVector)         \
  X(masked_bf16, __nv_bfloat16, __nv_bfloat16, true, Alignment::kVector) \
  X(masked_float_fp16, __half, float, true, Alignment::kVector)          \
  X(masked_element, __half, __half, true, Alignment::kElement)

// To be used in namespace lora_ext::kernel.
#define LORA_GROUPED_WGRAD_INSTANCE(T, F, masked, alignment)                 \
  template __global__ void lora_grouped_wgrad_sm80<T, F, masked, alignment>( \
      LoraGroupedWgradParams<T>)
#define LORA_GROUPED_REDUCE_WGRAD_INSTANCES(prefix, T)                                  \
  prefix __global__ void lora_grouped_reduce_wgrad<T, T>(LoraGroupedReduceWgradParams); \
  prefix __global__ void lora_grouped_reduce_wgrad<T, float>(LoraGroupedReduceWgradParams)
