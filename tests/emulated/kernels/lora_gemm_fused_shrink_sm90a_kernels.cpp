#define INSTANCE(...) template __global__ void __VA_ARGS__;
#include "emulated/kernels/lora_gemm_fused_shrink_sm90a.h"
#include "emulated/kernels/neighbours.h"
