// The instances of lora_gemm_sm80 that the tests run.
#pragma once
#include "emulated/kernels/instance.h"
#include "kernels/gemm/sm80/kernel.h"

// X(variant, T, tile, MN-major, masked)
#ifdef EVERY_INSTANCE
#define LORA_GEMM_SM80_VARIANTS(X)                                 \
  EVERY_HALF(X, _narrow, LoraGemmTile128x64, false, false)         \
  EVERY_HALF(X, _narrow_dx, LoraGemmTile128x64, true, false)       \
  EVERY_HALF(X, _narrow_dx_masked, LoraGemmTile128x64, true, true) \
  EVERY_HALF(X, _wide, LoraGemmTile128x128, false, false)          \
  EVERY_HALF(X, _wide_dx, LoraGemmTile128x128, true, false)        \
  EVERY_HALF(X, _wide_dx_masked, LoraGemmTile128x128, true, true)  \
  EVERY_HALF(X, _deep, LoraGemmTile128x128Deep, false, false)      \
  EVERY_HALF(X, _deep_dx, LoraGemmTile128x128Deep, true, false)    \
  EVERY_HALF(X, _deep_dx_masked, LoraGemmTile128x128Deep, true, true)
#else
#define LORA_GEMM_SM80_VARIANTS(X)                                      \
  X(forward_bf16, __nv_bfloat16, LoraGemmTile128x64, false, false)      \
  X(forward_fp16, __half, LoraGemmTile128x64, false, false)             \
  X(forward_middle, __half, LoraGemmTile128x128, false, false)          \
  X(forward_deep, __nv_bfloat16, LoraGemmTile128x128Deep, false, false) \
  X(dx_bf16, __nv_bfloat16, LoraGemmTile128x64, true, false)            \
  X(dx_fp16, __half, LoraGemmTile128x64, true, false)                   \
  X(dx_masked_bf16, __nv_bfloat16, LoraGemmTile128x64, true, true)      \
  X(dx_masked_middle, __half, LoraGemmTile128x128, true, true)
#endif

// The same with rows of Y at any address.
#define LORA_GEMM_SM80_ELEMENT_VARIANTS(X)                     \
  X(forward_element, __half, LoraGemmTile128x64, false, false) \
  X(dx_masked_element, __nv_bfloat16, LoraGemmTile128x64, true, true)

#define LORA_GEMM_SM80_INSTANCES(variant, T, tile, mn_major, masked) \
  INSTANCE(lora_gemm_sm80<T, tile, mn_major, masked>(LoraGemmParams<T>))
namespace lora_ext::kernel {
LORA_GEMM_SM80_VARIANTS(LORA_GEMM_SM80_INSTANCES)
}  // namespace lora_ext::kernel
