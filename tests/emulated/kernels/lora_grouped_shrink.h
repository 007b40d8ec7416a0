// The instances of lora_grouped_shrink and lora_grouped_reduce that the tests run.
#pragma once
#include "emulated/kernels/instance.h"
#include "kernels/grouped/shrink.h"

// X(variant, T, the factors' type, MN-major, masked, alignment)
#define LORA_GROUPED_SHRINK_VARIANTS(X)                                     \
  X(bf16, __nv_bfloat16, __nv_bfloat16, false, false, Alignment::kVector)   \
  X(float_fp16, __half, float, false, false, Alignment::kVector)            \
  X(masked_fp16, __half, __half, false, true, Alignment::kVector)           \
  X(masked_element, __nv_bfloat16, float, false, true, Alignment::kElement) \
  X(ds_fp16, __half, __half, true, false, Alignment::kVector)               \
  X(ds_float_bf16, __nv_bfloat16, float, true, false, Alignment::kVector)   \
  X(ds_element, __half, __half, true, false, Alignment::kElement)

#define LORA_GROUPED_SHRINK_INSTANCES(variant, T, F, mn_major, masked, alignment) \
  INSTANCE(lora_grouped_shrink_sm80<T, F, mn_major, masked, alignment>(LoraGroupedShrinkParams<T>))
namespace lora_ext::kernel {
LORA_GROUPED_SHRINK_VARIANTS(LORA_GROUPED_SHRINK_INSTANCES)
INSTANCE(lora_grouped_reduce<__nv_bfloat16>(LoraGroupedReduceParams<__nv_bfloat16>))
INSTANCE(lora_grouped_reduce<__half>(LoraGroupedReduceParams<__half>))
}  // namespace lora_ext::kernel
