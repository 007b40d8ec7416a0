// The instances of lora_gemm_fused_shrink_sm90a.
#pragma once
#include "emulated/kernels/instance.h"
#include "kernels/gemm/sm90a/fused_shrink.h"

// All that csrc/kernels/launch/ has. X(variant, T, MN-major, masked)
#define LORA_GEMM_FUSED_SHRINK_SM90A_VARIANTS(X) \
  X(forward_bf16, __nv_bfloat16, false, false)   \
  X(forward_fp16, __half, false, false)          \
  X(dx_bf16, __nv_bfloat16, true, false)         \
  X(dx_fp16, __half, true, false)                \
  X(dx_masked_bf16, __nv_bfloat16, true, true)   \
  X(dx_masked_fp16, __half, true, true)

// The last number is the number of 16s along k of the rank that are multiplied; small ones only
// forward.
#define LORA_GEMM_FUSED_SHRINK_SM90A_INSTANCE(T, mn_major, masked, tail)                      \
  INSTANCE(lora_gemm_fused_shrink_sm90a<T, LoraGemmSm90aTile128x256, mn_major, masked, tail>( \
      LoraFusedShrinkMaps, LoraGemmParams<T>, LoraFusedShrinkParams<T>))
#define LORA_GEMM_FUSED_SHRINK_SM90A_INSTANCES(variant, ...) \
  LORA_GEMM_FUSED_SHRINK_SM90A_INSTANCE(__VA_ARGS__, 4)
namespace lora_ext::kernel {
LORA_GEMM_FUSED_SHRINK_SM90A_VARIANTS(LORA_GEMM_FUSED_SHRINK_SM90A_INSTANCES)
LORA_GEMM_FUSED_SHRINK_SM90A_INSTANCE(__nv_bfloat16, false, false, 1)
LORA_GEMM_FUSED_SHRINK_SM90A_INSTANCE(__half, false, false, 1)
}  // namespace lora_ext::kernel
