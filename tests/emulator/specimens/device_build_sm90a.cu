// The specimen for sm_90a as nvcc compiles it: its source is CUDA, no fault site and no spill is
// left in it, and ptxas found no reason to serialise a wgmma.
#include "emulator/specimens/gemm_wgmma.h"

namespace specimens {

#define SPECIMENS_GEMM_WGMMA(type, major)                                                 \
  template __global__ void gemm_wgmma<type, major>(const __grid_constant__ GemmWgmmaMaps, \
                                                   const __grid_constant__ GemmWgmmaParams)
SPECIMENS_GEMM_WGMMA(__nv_bfloat16, ptx::Major::kK);
SPECIMENS_GEMM_WGMMA(__nv_bfloat16, ptx::Major::kMN);
SPECIMENS_GEMM_WGMMA(__half, ptx::Major::kK);
SPECIMENS_GEMM_WGMMA(__half, ptx::Major::kMN);
template __global__ void prepare_bias<>(const float*, float, float*, int);

}  // namespace specimens
