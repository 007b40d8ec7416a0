// lora_gemm_in_grid_sm90a with planted faults, apart from its host program so that only kernels are
// instrumented.
#include "emulator/kernels/lora_gemm_in_grid_sm90a.h"

namespace lora_ext::kernel {

#define INSTANCES(variant, ...) LORA_GEMM_IN_GRID_SM90A_INSTANCES(template, __VA_ARGS__)
LORA_GEMM_IN_GRID_SM90A_VARIANTS(INSTANCES)

}  // namespace lora_ext::kernel
