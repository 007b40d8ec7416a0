// The instances of lora_shrink_sm80 and lora_reduce that the tests run.
#pragma once
#include "emulated/kernels/instance.h"
#include "kernels/skinny/elementwise.h"
#include "kernels/skinny/shrink.h"

// X(variant, T, MN-major, masked, alignment)
#ifdef EVERY_INSTANCE
#define LORA_SHRINK_SM80_VARIANTS(X)                               \
  EVERY_HALF(X, , false, false, Alignment::kVector)                \
  EVERY_HALF(X, _masked, false, true, Alignment::kVector)          \
  EVERY_HALF(X, _ds, true, false, Alignment::kVector)              \
  EVERY_HALF(X, _element, false, false, Alignment::kElement)       \
  EVERY_HALF(X, _masked_element, false, true, Alignment::kElement) \
  EVERY_HALF(X, _ds_element, true, false, Alignment::kElement)
#else
#define LORA_SHRINK_SM80_VARIANTS(X)                                 \
  X(bf16, __nv_bfloat16, false, false, Alignment::kVector)           \
  X(fp16, __half, false, false, Alignment::kVector)                  \
  X(masked_bf16, __nv_bfloat16, false, true, Alignment::kVector)     \
  X(masked_fp16, __half, false, true, Alignment::kVector)            \
  X(masked_element, __nv_bfloat16, false, true, Alignment::kElement) \
  X(ds_bf16, __nv_bfloat16, true, false, Alignment::kVector)         \
  X(ds_fp16, __half, true, false, Alignment::kVector)                \
  X(ds_element, __half, true, false, Alignment::kElement)
#endif

#define LORA_SHRINK_SM80_INSTANCES(variant, T, mn_major, masked, alignment) \
  INSTANCE(lora_shrink_sm80<T, mn_major, masked, alignment>(LoraShrinkParams<T>))
namespace lora_ext::kernel {
LORA_SHRINK_SM80_VARIANTS(LORA_SHRINK_SM80_INSTANCES)
INSTANCE(lora_reduce<__nv_bfloat16>(LoraReduceParams<__nv_bfloat16>))
INSTANCE(lora_reduce<__half>(LoraReduceParams<__half>))
}  // namespace lora_ext::kernel
