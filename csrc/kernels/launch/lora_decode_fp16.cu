#include "kernels/launch/instances.h"

namespace lora_ext::kernel {

template LORA_EXT_DECODE(__half, __half);
template LORA_EXT_DECODE(__half, float);

}  // namespace lora_ext::kernel
