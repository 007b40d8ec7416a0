// The instances of lora_gemm_in_grid_sm90a.
#pragma once
#include "kernel/lora_gemm_sm90a/in_grid.h"

// All that csrc/cuda/ has. X(variant, T, MN-major, masked)
#define LORA_GEMM_IN_GRID_SM90A_VARIANTS(X)    \
  X(forward_bf16, __nv_bfloat16, false, false) \
  X(forward_fp16, __half, false, false)        \
  X(dx_bf16, __nv_bfloat16, true, false)       \
  X(dx_fp16, __half, true, false)              \
  X(dx_masked_bf16, __nv_bfloat16, true, true) \
  X(dx_masked_fp16, __half, true, true)

// Of a variant, one for each number of 16s along k in the rank. To be used in namespace
// lora_ext::kernel, behind `template` or `extern template`.
#define LORA_GEMM_IN_GRID_SM90A_INSTANCE(T, mn_major, masked, tail)                             \
  __global__ void lora_gemm_in_grid_sm90a<T, LoraGemmSm90aTile128x256, mn_major, masked, tail>( \
      LoraInGridMaps, LoraGemmParams<T>, LoraInGridParams<T>)
#define LORA_GEMM_IN_GRID_SM90A_INSTANCES(keyword, T, mn_major, masked) \
  LORA_GEMM_IN_GRID_SM90A_SMALL_##mn_major(keyword, T)                  \
      keyword LORA_GEMM_IN_GRID_SM90A_INSTANCE(T, mn_major, masked, 4);
#define LORA_GEMM_IN_GRID_SM90A_SMALL_true(keyword, T)
#define LORA_GEMM_IN_GRID_SM90A_SMALL_false(keyword, T) \
  keyword LORA_GEMM_IN_GRID_SM90A_INSTANCE(T, false, false, 1);
