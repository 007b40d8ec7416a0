// The specimens for sm_80 as nvcc compiles them: their source is CUDA, and no fault site and no
// spill is left in it.
#include "emulator/specimens/gemm_mma_sync.h"
#include "emulator/specimens/reduction.h"

namespace specimens {

template __global__ void ordered_sum<>(OrderedSumParams);
template __global__ void sum_and_max<>(SumAndMaxParams);
template __global__ void gemm_mma_sync<__nv_bfloat16, false>(GemmMmaSyncParams<__nv_bfloat16>);
template __global__ void gemm_mma_sync<__nv_bfloat16, true>(GemmMmaSyncParams<__nv_bfloat16>);
template __global__ void gemm_mma_sync<__half, false>(GemmMmaSyncParams<__half>);
template __global__ void gemm_mma_sync<__half, true>(GemmMmaSyncParams<__half>);

}  // namespace specimens
