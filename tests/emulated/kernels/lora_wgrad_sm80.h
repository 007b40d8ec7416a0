// The instances of lora_wgrad_sm80 and lora_reduce_wgrad that the tests run.
#pragma once
#include "emulated/kernels/instance.h"
#include "kernels/skinny/elementwise.h"
#include "kernels/skinny/wgrad.h"

// X(variant, T, masked, alignment)
#ifdef EVERY_INSTANCE
#define LORA_WGRAD_SM80_VARIANTS(X)                   \
  EVERY_HALF(X, , false, Alignment::kVector)          \
  EVERY_HALF(X, _masked, true, Alignment::kVector)    \
  EVERY_HALF(X, _element, false, Alignment::kElement) \
  EVERY_HALF(X, _masked_element, true, Alignment::kElement)
#else
#define LORA_WGRAD_SM80_VARIANTS(X)                       \
  X(bf16, __nv_bfloat16, false, Alignment::kVector)       \
  X(fp16, __half, false, Alignment::kVector)              \
  X(masked_bf16, __nv_bfloat16, true, Alignment::kVector) \
  X(masked_fp16, __half, true, Alignment::kVector)        \
  X(masked_element, __nv_bfloat16, true, Alignment::kElement)
#endif

#define LORA_WGRAD_SM80_INSTANCES(variant, T, masked, alignment) \
  INSTANCE(lora_wgrad_sm80<T, masked, alignment>(LoraWgradParams<T>))
namespace lora_ext::kernel {
LORA_WGRAD_SM80_VARIANTS(LORA_WGRAD_SM80_INSTANCES)
INSTANCE(lora_reduce_wgrad<__nv_bfloat16>(LoraReduceWgradParams))
INSTANCE(lora_reduce_wgrad<__half>(LoraReduceWgradParams))
}  // namespace lora_ext::kernel
