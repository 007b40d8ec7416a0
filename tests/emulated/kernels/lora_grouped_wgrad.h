// The instances of lora_grouped_wgrad and lora_grouped_reduce_wgrad that the tests run.
#pragma once
#include "emulated/kernels/instance.h"
#include "kernels/grouped/wgrad.h"

// X(variant, T, the factors' type, masked, alignment)
#ifdef EVERY_INSTANCE
#define LORA_GROUPED_WGRAD_VARIANTS(X)                \
  EVERY_PAIR(X, , false, Alignment::kVector)          \
  EVERY_PAIR(X, _masked, true, Alignment::kVector)    \
  EVERY_PAIR(X, _element, false, Alignment::kElement) \
  EVERY_PAIR(X, _masked_element, true, Alignment::kElement)
#else
#define LORA_GROUPED_WGRAD_VARIANTS(X)                                   \
  X(bf16, __nv_bfloat16, __nv_bfloat16, false, Alignment::kVector)       \
  X(fp16, __half, __half, false, Alignment::kVector)                     \
  X(float_bf16, __nv_bfloat16, float, false, Alignment::kVector)         \
  X(masked_bf16, __nv_bfloat16, __nv_bfloat16, true, Alignment::kVector) \
  X(masked_float_fp16, __half, float, true, Alignment::kVector)          \
  X(masked_element, __half, __half, true, Alignment::kElement)
#endif

#define LORA_GROUPED_WGRAD_INSTANCES(variant, T, F, masked, alignment) \
  INSTANCE(lora_grouped_wgrad_sm80<T, F, masked, alignment>(LoraGroupedWgradParams<T>))
namespace lora_ext::kernel {
LORA_GROUPED_WGRAD_VARIANTS(LORA_GROUPED_WGRAD_INSTANCES)
INSTANCE(lora_grouped_reduce_wgrad<__nv_bfloat16, __nv_bfloat16>(LoraGroupedReduceWgradParams))
INSTANCE(lora_grouped_reduce_wgrad<__nv_bfloat16, float>(LoraGroupedReduceWgradParams))
INSTANCE(lora_grouped_reduce_wgrad<__half, __half>(LoraGroupedReduceWgradParams))
INSTANCE(lora_grouped_reduce_wgrad<__half, float>(LoraGroupedReduceWgradParams))
}  // namespace lora_ext::kernel
