// The instances of lora_gemm_in_grid_sm90a that the tests run, with planted faults.
#pragma once
#include "emulator/fault.h"
#include "kernel/lora_gemm_sm90a_in_grid.h"

// X(variant, T, tile, MN-major, masked)
#define LORA_GEMM_IN_GRID_SM90A_VARIANTS(X)                              \
  X(forward_bf16, __nv_bfloat16, LoraGemmSm90aTile128x256, false, false) \
  X(forward_fp16, __half, LoraGemmSm90aTile128x128, false, false)        \
  X(dx_bf16, __nv_bfloat16, LoraGemmSm90aTile128x128, true, false)       \
  X(dx_fp16, __half, LoraGemmSm90aTile128x256, true, false)              \
  X(dx_masked_bf16, __nv_bfloat16, LoraGemmSm90aTile128x256, true, true) \
  X(dx_masked_fp16, __half, LoraGemmSm90aTile128x128, true, true)

// Of a variant, one for each number of 16s along k in the rank. To be used in namespace
// lora_ext::kernel, behind `template` or `extern template`.
#define LORA_GEMM_IN_GRID_SM90A_INSTANCE(T, tile, mn_major, masked, tail)           \
  __global__ void                                                                   \
  lora_gemm_in_grid_sm90a<T, tile, mn_major, masked, tail, emulator::PlantedFault>( \
      LoraInGridMaps, LoraGemmParams<T>, LoraInGridParams<T>)
#define LORA_GEMM_IN_GRID_SM90A_INSTANCES(keyword, ...)     \
  keyword LORA_GEMM_IN_GRID_SM90A_INSTANCE(__VA_ARGS__, 1); \
  keyword LORA_GEMM_IN_GRID_SM90A_INSTANCE(__VA_ARGS__, 2); \
  keyword LORA_GEMM_IN_GRID_SM90A_INSTANCE(__VA_ARGS__, 4);
