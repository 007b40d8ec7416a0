#include "kernels/launch/instances.h"

namespace lora_ext::kernel {

template LORA_EXT_LINEAR(LoraLinearForward, __nv_bfloat16);
template LORA_EXT_LINEAR(LoraLinearBackward, __nv_bfloat16);

}  // namespace lora_ext::kernel
