// lora_decode, apart from its host program so that only kernels are instrumented.
#include "emulator/kernels/lora_decode.h"

namespace lora_ext::kernel {

#define INSTANCE(variant, ...) LORA_DECODE_INSTANCE(__VA_ARGS__);
LORA_DECODE_VARIANTS(INSTANCE)

}  // namespace lora_ext::kernel
