// The instances of lora_split that the tests run.
#pragma once
#include "emulated/kernels/instance.h"
#include "kernels/skinny/elementwise.h"

// X(variant, T)
#define LORA_SPLIT_VARIANTS(X) \
  X(bf16, __nv_bfloat16)       \
  X(fp16, __half)

#define LORA_SPLIT_INSTANCES(variant, T) INSTANCE(lora_split<T>(LoraSplitParams<T>))
namespace lora_ext::kernel {
LORA_SPLIT_VARIANTS(LORA_SPLIT_INSTANCES)
}  // namespace lora_ext::kernel
