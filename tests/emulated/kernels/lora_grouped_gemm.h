// The instances of lora_grouped_gemm_sm80 that the tests run.
#pragma once
#include "emulated/kernels/instance.h"
#include "kernels/grouped/gemm.h"

// X(variant, T, the factors' type, tile, MN-major, masked)
#ifdef EVERY_INSTANCE
#define LORA_GROUPED_GEMM_VARIANTS(X)                              \
  EVERY_PAIR(X, _narrow, LoraGemmTile128x64, false, false)         \
  EVERY_PAIR(X, _narrow_dx, LoraGemmTile128x64, true, false)       \
  EVERY_PAIR(X, _narrow_dx_masked, LoraGemmTile128x64, true, true) \
  EVERY_PAIR(X, _deep, LoraGemmTile128x128Deep, false, false)      \
  EVERY_PAIR(X, _deep_dx, LoraGemmTile128x128Deep, true, false)    \
  EVERY_PAIR(X, _deep_dx_masked, LoraGemmTile128x128Deep, true, true)
#else
#define LORA_GROUPED_GEMM_VARIANTS(X)                                                  \
  X(bf16_deep, __nv_bfloat16, __nv_bfloat16, LoraGemmTile128x128Deep, false, false)    \
  X(float_fp16_deep, __half, float, LoraGemmTile128x128Deep, false, false)             \
  X(bf16_128x64, __nv_bfloat16, __nv_bfloat16, LoraGemmTile128x64, false, false)       \
  X(float_128x64, __nv_bfloat16, float, LoraGemmTile128x64, false, false)              \
  X(dx_fp16_deep, __half, __half, LoraGemmTile128x128Deep, true, false)                \
  X(dx_masked_deep, __nv_bfloat16, __nv_bfloat16, LoraGemmTile128x128Deep, true, true) \
  X(dx_masked_float, __half, float, LoraGemmTile128x64, true, true)                    \
  X(dx_masked_128x64, __nv_bfloat16, __nv_bfloat16, LoraGemmTile128x64, true, true)
#endif

// The same with rows of Y at any address.
#define LORA_GROUPED_GEMM_ELEMENT_VARIANTS(X)                              \
  X(float_element, __nv_bfloat16, float, LoraGemmTile128x64, false, false) \
  X(dx_element, __nv_bfloat16, __nv_bfloat16, LoraGemmTile128x64, true, true)

#define LORA_GROUPED_GEMM_INSTANCES(variant, T, F, Tile, mn_major, masked) \
  INSTANCE(lora_grouped_gemm_sm80<T, F, Tile, mn_major, masked>(LoraGroupedGemmParams<T>))
namespace lora_ext::kernel {
LORA_GROUPED_GEMM_VARIANTS(LORA_GROUPED_GEMM_INSTANCES)
}  // namespace lora_ext::kernel
