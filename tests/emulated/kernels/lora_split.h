// The instances of lora_split that the tests run.
#pragma once
#include "kernel/lora_split.h"

// X(variant, T)
#define LORA_SPLIT_VARIANTS(X) \
  X(bf16, __nv_bfloat16)       \
  X(fp16, __half)

// To be used in namespace lora_ext::kernel.
#define LORA_SPLIT_INSTANCE(T) template __global__ void lora_split<T>(LoraSplitParams<T>)
