// The instances of lora_gemm_sm90a.
#pragma once
#include "emulated/kernels/instance.h"
#include "kernels/gemm/sm90a/kernel.h"

// All that csrc/kernels/launch/ has. X(variant, T, MN-major, masked, tile, planned)
#define LORA_GEMM_SM90A_TILES(X, product, ...)              \
  X(product##_128x256, __VA_ARGS__, 128x256, kWgmma128x256) \
  X(product##_128x192_pingpong, __VA_ARGS__, 128x192Pingpong, kPingpong128x192)
#define LORA_GEMM_SM90A_VARIANTS(X)                                   \
  LORA_GEMM_SM90A_TILES(X, forward_bf16, __nv_bfloat16, false, false) \
  LORA_GEMM_SM90A_TILES(X, forward_fp16, __half, false, false)        \
  LORA_GEMM_SM90A_TILES(X, dx_bf16, __nv_bfloat16, true, false)       \
  LORA_GEMM_SM90A_TILES(X, dx_fp16, __half, true, false)              \
  LORA_GEMM_SM90A_TILES(X, dx_masked_bf16, __nv_bfloat16, true, true) \
  LORA_GEMM_SM90A_TILES(X, dx_masked_fp16, __half, true, true)

#define LORA_GEMM_SM90A_INSTANCES(variant, T, mn_major, masked, tile, planned)                  \
  INSTANCE(lora_gemm_sm90a<T, LoraGemmSm90aTile##tile, mn_major, masked, 1>(LoraGemmMaps,       \
                                                                            LoraGemmParams<T>)) \
  INSTANCE(lora_gemm_sm90a<T, LoraGemmSm90aTile##tile, mn_major, masked, 4>(LoraGemmMaps,       \
                                                                            LoraGemmParams<T>))
namespace lora_ext::kernel {
LORA_GEMM_SM90A_VARIANTS(LORA_GEMM_SM90A_INSTANCES)
}  // namespace lora_ext::kernel
