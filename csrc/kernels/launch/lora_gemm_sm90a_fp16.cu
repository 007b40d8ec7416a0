#include "kernels/launch/instances.h"

namespace lora_ext::kernel {

template LORA_EXT_GEMM_SM90A(__half);

}  // namespace lora_ext::kernel
