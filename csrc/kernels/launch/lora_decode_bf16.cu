#include "kernels/launch/instances.h"

namespace lora_ext::kernel {

template LORA_EXT_DECODE(__nv_bfloat16, __nv_bfloat16);
template LORA_EXT_DECODE(__nv_bfloat16, float);

}  // namespace lora_ext::kernel
