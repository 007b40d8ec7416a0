// The instances of lora_gemm_sm90a that the tests run, with planted faults, and the grid before
// them that writes T.
#pragma once
#include "emulator/fault.h"
#include "kernel/lora_gemm_sm90a.h"

// X(variant, T, tile, MN-major, masked)
#define LORA_GEMM_SM90A_VARIANTS(X)                                                      \
  X(forward_bf16, __nv_bfloat16, LoraGemmSm90aTile128x256, false, false)                 \
  X(forward_fp16, __half, LoraGemmSm90aTile128x256, false, false)                        \
  X(dx_bf16, __nv_bfloat16, LoraGemmSm90aTile128x256, true, false)                       \
  X(dx_masked_fp16, __half, LoraGemmSm90aTile128x256, true, true)                        \
  X(forward_128, __nv_bfloat16, LoraGemmSm90aTile128x128, false, false)                  \
  X(dx_128, __half, LoraGemmSm90aTile128x128, true, false)                               \
  X(dx_masked_128, __nv_bfloat16, LoraGemmSm90aTile128x128, true, true)                  \
  X(forward_pingpong_128, __half, LoraGemmSm90aTile128x128Pingpong, false, false)        \
  X(dx_masked_pingpong_128, __nv_bfloat16, LoraGemmSm90aTile128x128Pingpong, true, true) \
  X(forward_pingpong_192, __nv_bfloat16, LoraGemmSm90aTile128x192Pingpong, false, false) \
  X(dx_pingpong_192, __half, LoraGemmSm90aTile128x192Pingpong, true, false)              \
  X(dx_masked_pingpong_192, __nv_bfloat16, LoraGemmSm90aTile128x192Pingpong, true, true)

// Of a variant, one for each number of 16s along k in the last step of the rank. To be used in
// namespace lora_ext::kernel, behind `template` or `extern template`.
#define LORA_GEMM_SM90A_INSTANCE(T, tile, mn_major, masked, tail)                           \
  __global__ void lora_gemm_sm90a<T, tile, mn_major, masked, tail, emulator::PlantedFault>( \
      LoraGemmMaps, LoraGemmParams<T>)
#define LORA_GEMM_SM90A_INSTANCES(keyword, ...)     \
  keyword LORA_GEMM_SM90A_INSTANCE(__VA_ARGS__, 1); \
  keyword LORA_GEMM_SM90A_INSTANCE(__VA_ARGS__, 2); \
  keyword LORA_GEMM_SM90A_INSTANCE(__VA_ARGS__, 4);

namespace lora_ext::kernel {

// t [elements] = source: the grid before lora_gemm, which may start while this one runs.
template <class T>
__global__ void write_t(const T* source, T* t, int elements) {
  ptx::griddepcontrol_launch_dependents();
  const int threads = static_cast<int>(gridDim.x * blockDim.x);
  for (int i = static_cast<int>(blockIdx.x * blockDim.x + threadIdx.x); i < elements; i += threads)
    t[i] = source[i];
}

}  // namespace lora_ext::kernel
