// lora_gemm_sm90a with planted faults, apart from its host program so that only kernels are
// instrumented.
#include "emulator/kernels/lora_gemm_sm90a.h"

namespace lora_ext::kernel {

#define INSTANCES(variant, ...) LORA_GEMM_SM90A_INSTANCES(template, __VA_ARGS__)
LORA_GEMM_SM90A_VARIANTS(INSTANCES)

template __global__ void write_t(const __half*, __half*, int);
template __global__ void write_t(const __nv_bfloat16*, __nv_bfloat16*, int);

}  // namespace lora_ext::kernel
