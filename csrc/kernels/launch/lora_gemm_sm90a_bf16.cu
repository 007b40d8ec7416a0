#include "kernels/launch/instances.h"

namespace lora_ext::kernel {

template LORA_EXT_GEMM_SM90A(__nv_bfloat16);

}  // namespace lora_ext::kernel
