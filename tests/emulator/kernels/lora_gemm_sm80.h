// The instances of lora_gemm_sm80 that the tests run.
#pragma once
#include "kernel/lora_gemm_sm80.h"

// X(variant, T, tile, MN-major, masked, alignment)
#define LORA_GEMM_SM80_VARIANTS(X)                                                          \
  X(forward_bf16, __nv_bfloat16, LoraGemmTile128x64, false, false, Alignment::kVector)      \
  X(forward_fp16, __half, LoraGemmTile128x64, false, false, Alignment::kVector)             \
  X(forward_middle, __half, LoraGemmTile128x128, false, false, Alignment::kVector)          \
  X(forward_deep, __nv_bfloat16, LoraGemmTile128x128Deep, false, false, Alignment::kVector) \
  X(forward_large, __nv_bfloat16, LoraGemmTile128x256, false, false, Alignment::kVector)    \
  X(forward_element, __half, LoraGemmTile128x64, false, false, Alignment::kElement)         \
  X(dx_bf16, __nv_bfloat16, LoraGemmTile128x64, true, false, Alignment::kVector)            \
  X(dx_fp16, __half, LoraGemmTile128x64, true, false, Alignment::kVector)                   \
  X(dx_masked_bf16, __nv_bfloat16, LoraGemmTile128x64, true, true, Alignment::kVector)      \
  X(dx_masked_middle, __half, LoraGemmTile128x128, true, true, Alignment::kVector)          \
  X(dx_masked_large, __nv_bfloat16, LoraGemmTile128x256, true, true, Alignment::kVector)    \
  X(dx_masked_element, __nv_bfloat16, LoraGemmTile128x64, true, true, Alignment::kElement)

// To be used in namespace lora_ext::kernel.
#define LORA_GEMM_SM80_INSTANCE(T, tile, mn_major, masked, alignment) \
  template __global__ void lora_gemm_sm80<T, tile, mn_major, masked, alignment>(LoraGemmParams<T>)
