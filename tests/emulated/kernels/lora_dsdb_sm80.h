// The instances of lora_dsdb_sm80 that the tests run.
#pragma once
#include "emulated/kernels/instance.h"
#include "kernels/skinny/dsdb.h"

// X(variant, T, columns, alignment)
#ifdef EVERY_INSTANCE
#define LORA_DSDB_SM80_VARIANTS(X)                    \
  EVERY_HALF(X, _16, 16, Alignment::kVector)          \
  EVERY_HALF(X, _32, 32, Alignment::kVector)          \
  EVERY_HALF(X, _element_16, 16, Alignment::kElement) \
  EVERY_HALF(X, _element_32, 32, Alignment::kElement)
#else
#define LORA_DSDB_SM80_VARIANTS(X)                  \
  X(bf16_16, __nv_bfloat16, 16, Alignment::kVector) \
  X(bf16_32, __nv_bfloat16, 32, Alignment::kVector) \
  X(fp16_16, __half, 16, Alignment::kVector)        \
  X(fp16_32, __half, 32, Alignment::kVector)        \
  X(element_16, __half, 16, Alignment::kElement)    \
  X(element_32, __nv_bfloat16, 32, Alignment::kElement)
#endif

#define LORA_DSDB_SM80_INSTANCES(variant, T, columns, alignment) \
  INSTANCE(lora_dsdb_sm80<T, columns, alignment>(LoraDsdbParams<T>))
namespace lora_ext::kernel {
LORA_DSDB_SM80_VARIANTS(LORA_DSDB_SM80_INSTANCES)
}  // namespace lora_ext::kernel
