// lora_gemm_in_grid_sm90a, apart from its host program so that only kernels are
// instrumented.
#include "emulated/kernels/lora_gemm_in_grid_sm90a.h"
#include "emulated/kernels/neighbours.h"

namespace lora_ext::kernel {

#define INSTANCES(variant, ...) LORA_GEMM_IN_GRID_SM90A_INSTANCES(template, __VA_ARGS__)
LORA_GEMM_IN_GRID_SM90A_VARIANTS(INSTANCES)

}  // namespace lora_ext::kernel

namespace kernels {

NEIGHBOUR_COPY_EARLY(__half);
NEIGHBOUR_COPY_EARLY(__nv_bfloat16);

}  // namespace kernels
