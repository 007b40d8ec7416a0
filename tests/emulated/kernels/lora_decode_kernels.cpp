// lora_decode, apart from its host program so that only kernels are instrumented.
#include "emulated/kernels/lora_decode.h"

void kernels::clear_counts(uint32_t* counts, int64_t count) {
  for (int64_t i = 0; i < count; ++i) counts[i] = 0;
}

namespace lora_ext::kernel {

#define INSTANCE(variant, ...) LORA_DECODE_INSTANCE(__VA_ARGS__);
LORA_DECODE_VARIANTS(INSTANCE)

}  // namespace lora_ext::kernel
