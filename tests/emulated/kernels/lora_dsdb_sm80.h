// The instances of lora_dsdb_sm80 that the tests run.
#pragma once
#include "kernel/lora_dsdb_sm80.h"

// X(variant, T, columns, alignment)
#define LORA_DSDB_SM80_VARIANTS(X)                  \
  X(bf16_16, __nv_bfloat16, 16, Alignment::kVector) \
  X(bf16_32, __nv_bfloat16, 32, Alignment::kVector) \
  X(fp16_16, __half, 16, Alignment::kVector)        \
  X(fp16_32, __half, 32, Alignment::kVector)        \
  X(element_16, __half, 16, Alignment::kElement)    \
  X(element_32, __nv_bfloat16, 32, Alignment::kElement)

// To be used in namespace lora_ext::kernel.
#define LORA_DSDB_SM80_INSTANCE(T, columns, alignment) \
  template __global__ void lora_dsdb_sm80<T, columns, alignment>(LoraDsdbParams<T>)
