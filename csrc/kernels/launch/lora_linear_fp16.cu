#include "kernels/launch/instances.h"

namespace lora_ext::kernel {

template LORA_EXT_LINEAR(LoraLinearForward, __half);
template LORA_EXT_LINEAR(LoraLinearBackward, __half);

}  // namespace lora_ext::kernel
