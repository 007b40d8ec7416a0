// The kernels as nvcc compiles them: every tile, orientation and alignment.
#include "kernel/lora_gemm_sm80.h"
#include "kernel/lora_reduce.h"
#include "kernel/lora_shrink_sm80.h"

namespace lora_ext::kernel {

#define INSTANCE(T, tile, mn_major, masked, alignment)                           \
  template __global__ void lora_gemm_sm80<T, tile, mn_major, masked, alignment>( \
      const __grid_constant__ LoraGemmParams<T>)
#define TILES(T, mn_major, masked, alignment)                    \
  INSTANCE(T, LoraGemmTile128x256, mn_major, masked, alignment); \
  INSTANCE(T, LoraGemmTile128x128, mn_major, masked, alignment); \
  INSTANCE(T, LoraGemmTile128x64, mn_major, masked, alignment)
TILES(__nv_bfloat16, false, false, Alignment::kVector);
TILES(__nv_bfloat16, true, false, Alignment::kVector);
INSTANCE(__nv_bfloat16, LoraGemmTile128x128, true, true, Alignment::kVector);
INSTANCE(__nv_bfloat16, LoraGemmTile128x64, true, true, Alignment::kVector);
INSTANCE(__half, LoraGemmTile128x64, false, false, Alignment::kElement);
INSTANCE(__half, LoraGemmTile128x64, true, false, Alignment::kElement);
INSTANCE(__half, LoraGemmTile128x64, true, true, Alignment::kElement);

#define SHRINK(T, masked, alignment)                               \
  template __global__ void lora_shrink_sm80<T, masked, alignment>( \
      const __grid_constant__ LoraShrinkParams<T>)
SHRINK(__nv_bfloat16, false, Alignment::kVector);
SHRINK(__nv_bfloat16, true, Alignment::kVector);
SHRINK(__half, false, Alignment::kElement);
SHRINK(__half, true, Alignment::kElement);
template __global__ void lora_reduce<__half>(const __grid_constant__ LoraReduceParams<__half>);

}  // namespace lora_ext::kernel
