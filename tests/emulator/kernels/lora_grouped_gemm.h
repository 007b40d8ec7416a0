// The instances of lora_grouped_gemm_sm80 that the tests run.
#pragma once
#include "kernel/lora_grouped_gemm.h"

// X(variant, T, the factors' type, tile, MN-major, masked, alignment)
#define LORA_GROUPED_GEMM_VARIANTS(X)                                                           \
  X(bf16_128x256, __nv_bfloat16, __nv_bfloat16, LoraGemmTile128x256, false, false,              \
    Alignment::kVector)                                                                         \
  X(float_fp16_128x128, __half, float, LoraGemmTile128x128, false, false, Alignment::kVector)   \
  X(bf16_128x64, __nv_bfloat16, __nv_bfloat16, LoraGemmTile128x64, false, false,                \
    Alignment::kVector)                                                                         \
  X(float_element, __nv_bfloat16, float, LoraGemmTile128x64, false, false, Alignment::kElement) \
  X(dx_fp16_128x256, __half, __half, LoraGemmTile128x256, true, false, Alignment::kVector)      \
  X(dx_masked_128x128, __half, __half, LoraGemmTile128x128, true, true, Alignment::kVector)     \
  X(dx_masked_128x256, __nv_bfloat16, __nv_bfloat16, LoraGemmTile128x256, true, true,           \
    Alignment::kVector)                                                                         \
  X(dx_masked_float, __half, float, LoraGemmTile128x64, true, true, Alignment::kVector)         \
  X(dx_element, __nv_bfloat16, __nv_bfloat16, LoraGemmTile128x64, true, true, Alignment::kElement)

// To be used in namespace lora_ext::kernel.
#define LORA_GROUPED_GEMM_INSTANCE(T, F, Tile, mn_major, masked, alignment)                 \
  template __global__ void lora_grouped_gemm_sm80<T, F, Tile, mn_major, masked, alignment>( \
      LoraGroupedGemmParams<T>)
