#include "cuda/instances.h"

namespace lora_ext::kernel {

template LORA_EXT_GEMM_IN_GRID_SM90A(__nv_bfloat16);

}  // namespace lora_ext::kernel
