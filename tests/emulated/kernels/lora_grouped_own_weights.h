// The instances of lora_grouped_gemm_own_weights_sm80 that the tests run.
#pragma once
#include "emulated/kernels/instance.h"
#include "kernels/grouped/own_weights.h"

// X(variant, T, tile, Q is MN-major, U is MN-major, masked)
#ifdef EVERY_INSTANCE
#define LORA_GROUPED_OWN_WEIGHTS_VARIANTS(X)                                         \
  EVERY_HALF(X, _128x64, LoraGemmTile128x64, false, false, false)                    \
  EVERY_HALF(X, _128x64_transposed, LoraGemmTile128x64, true, false, false)          \
  EVERY_HALF(X, _128x64_dx, LoraGemmTile128x64, true, true, false)                   \
  EVERY_HALF(X, _128x64_dx_masked, LoraGemmTile128x64, true, true, true)             \
  EVERY_HALF(X, _128x64_dx_transposed, LoraGemmTile128x64, false, true, false)       \
  EVERY_HALF(X, _128x64_dx_transposed_masked, LoraGemmTile128x64, false, true, true) \
  EVERY_HALF(X, , LoraGemmTile128x128, false, false, false)                          \
  EVERY_HALF(X, _dx, LoraGemmTile128x128, true, true, false)                         \
  EVERY_HALF(X, _dx_masked, LoraGemmTile128x128, true, true, true)                   \
  EVERY_HALF(X, _deep, LoraGemmTile128x128Deep, false, false, false)                 \
  EVERY_HALF(X, _deep_dx, LoraGemmTile128x128Deep, true, true, false)                \
  EVERY_HALF(X, _deep_dx_masked, LoraGemmTile128x128Deep, true, true, true)
#else
#define LORA_GROUPED_OWN_WEIGHTS_VARIANTS(X)                                  \
  X(bf16, __nv_bfloat16, LoraGemmTile128x128, false, false, false)            \
  X(fp16_deep, __half, LoraGemmTile128x128Deep, false, false, false)          \
  X(fp16_128x64, __half, LoraGemmTile128x64, false, false, false)             \
  X(transposed, __nv_bfloat16, LoraGemmTile128x64, true, false, false)        \
  X(dx_fp16, __half, LoraGemmTile128x128, true, true, false)                  \
  X(dx_masked_deep, __nv_bfloat16, LoraGemmTile128x128Deep, true, true, true) \
  X(dx_masked_128x64, __half, LoraGemmTile128x64, true, true, true)           \
  X(dx_transposed, __half, LoraGemmTile128x64, false, true, false)            \
  X(dx_transposed_masked, __nv_bfloat16, LoraGemmTile128x64, false, true, true)
#endif

// The same with rows of P, Q and Y at any address.
#ifdef EVERY_INSTANCE
#define LORA_GROUPED_OWN_WEIGHTS_ELEMENT_VARIANTS(X)                            \
  EVERY_HALF(X, _element, LoraGemmTile128x64, false, false, false)              \
  EVERY_HALF(X, _transposed_element, LoraGemmTile128x64, true, false, false)    \
  EVERY_HALF(X, _dx_element, LoraGemmTile128x64, true, true, false)             \
  EVERY_HALF(X, _dx_masked_element, LoraGemmTile128x64, true, true, true)       \
  EVERY_HALF(X, _dx_transposed_element, LoraGemmTile128x64, false, true, false) \
  EVERY_HALF(X, _dx_transposed_masked_element, LoraGemmTile128x64, false, true, true)
#else
#define LORA_GROUPED_OWN_WEIGHTS_ELEMENT_VARIANTS(X)                 \
  X(element, __nv_bfloat16, LoraGemmTile128x64, false, false, false) \
  X(dx_element, __nv_bfloat16, LoraGemmTile128x64, true, true, true)
#endif

#define LORA_GROUPED_OWN_WEIGHTS_INSTANCES(variant, T, Tile, mn_major, u_mn_major, masked) \
  INSTANCE(lora_grouped_gemm_own_weights_sm80<T, Tile, mn_major, u_mn_major, masked>(      \
      LoraOwnWeightsParams<T>))
namespace lora_ext::kernel {
LORA_GROUPED_OWN_WEIGHTS_VARIANTS(LORA_GROUPED_OWN_WEIGHTS_INSTANCES)
LORA_GROUPED_OWN_WEIGHTS_ELEMENT_VARIANTS(LORA_GROUPED_OWN_WEIGHTS_INSTANCES)
}  // namespace lora_ext::kernel
