// The instances of lora_grouped_shrink and lora_grouped_reduce that the tests run.
#pragma once
#include "emulated/kernels/instance.h"
#include "kernels/grouped/shrink.h"

// X(variant, T, the factors' type, MN-major, masked, alignment)
#ifdef EVERY_INSTANCE
#define LORA_GROUPED_SHRINK_VARIANTS(X)                            \
  EVERY_PAIR(X, , false, false, Alignment::kVector)                \
  EVERY_PAIR(X, _masked, false, true, Alignment::kVector)          \
  EVERY_PAIR(X, _ds, true, false, Alignment::kVector)              \
  EVERY_PAIR(X, _element, false, false, Alignment::kElement)       \
  EVERY_PAIR(X, _masked_element, false, true, Alignment::kElement) \
  EVERY_PAIR(X, _ds_element, true, false, Alignment::kElement)
#else
#define LORA_GROUPED_SHRINK_VARIANTS(X)                                     \
  X(bf16, __nv_bfloat16, __nv_bfloat16, false, false, Alignment::kVector)   \
  X(float_fp16, __half, float, false, false, Alignment::kVector)            \
  X(masked_fp16, __half, __half, false, true, Alignment::kVector)           \
  X(masked_element, __nv_bfloat16, float, false, true, Alignment::kElement) \
  X(ds_fp16, __half, __half, true, false, Alignment::kVector)               \
  X(ds_float_bf16, __nv_bfloat16, float, true, false, Alignment::kVector)   \
  X(ds_element, __half, __half, true, false, Alignment::kElement)
#endif

#define LORA_GROUPED_SHRINK_INSTANCES(variant, T, F, mn_major, masked, alignment) \
  INSTANCE(lora_grouped_shrink_sm80<T, F, mn_major, masked, alignment>(LoraGroupedShrinkParams<T>))
namespace lora_ext::kernel {
LORA_GROUPED_SHRINK_VARIANTS(LORA_GROUPED_SHRINK_INSTANCES)
INSTANCE(lora_grouped_reduce<__nv_bfloat16>(LoraGroupedReduceParams<__nv_bfloat16>))
INSTANCE(lora_grouped_reduce<__half>(LoraGroupedReduceParams<__half>))
}  // namespace lora_ext::kernel
