// lora_split.
#include "emulated/kernels/lora_split.h"

namespace lora_ext::kernel {

#define INSTANCE(variant, ...) LORA_SPLIT_INSTANCE(__VA_ARGS__);
LORA_SPLIT_VARIANTS(INSTANCE)

}  // namespace lora_ext::kernel
