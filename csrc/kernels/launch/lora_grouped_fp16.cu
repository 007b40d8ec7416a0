#include "kernels/launch/instances.h"

namespace lora_ext::kernel {

template LORA_EXT_GROUPED(LoraGroupedForward, __half);
template LORA_EXT_GROUPED(LoraGroupedBackward, __half);

}  // namespace lora_ext::kernel
