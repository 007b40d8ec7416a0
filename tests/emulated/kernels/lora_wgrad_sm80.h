// The instances of lora_wgrad_sm80 and lora_reduce_wgrad that the tests run.
#pragma once
#include "kernel/lora_reduce_wgrad.h"
#include "kernel/lora_wgrad_sm80.h"

// X(variant, T, masked, alignment)
#define LORA_WGRAD_SM80_VARIANTS(X)                       \
  X(bf16, __nv_bfloat16, false, Alignment::kVector)       \
  X(fp16, __half, false, Alignment::kVector)              \
  X(masked_bf16, __nv_bfloat16, true, Alignment::kVector) \
  X(masked_fp16, __half, true, Alignment::kVector)        \
  X(masked_element, __nv_bfloat16, true, Alignment::kElement)

// To be used in namespace lora_ext::kernel.
#define LORA_WGRAD_SM80_INSTANCE(T, masked, alignment) \
  template __global__ void lora_wgrad_sm80<T, masked, alignment>(LoraWgradParams<T>)
#define LORA_REDUCE_WGRAD_INSTANCE(T) \
  template __global__ void lora_reduce_wgrad<T>(LoraReduceWgradParams)
