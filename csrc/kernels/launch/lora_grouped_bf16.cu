#include "kernels/launch/instances.h"

namespace lora_ext::kernel {

template LORA_EXT_GROUPED(LoraGroupedForward, __nv_bfloat16);
template LORA_EXT_GROUPED(LoraGroupedBackward, __nv_bfloat16);

}  // namespace lora_ext::kernel
