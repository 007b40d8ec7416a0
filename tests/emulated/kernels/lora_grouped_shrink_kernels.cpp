// lora_grouped_shrink and lora_grouped_reduce, apart from their host program so that only kernels
// are instrumented.
#include "emulated/kernels/lora_grouped_shrink.h"

namespace lora_ext::kernel {

#define INSTANCE(variant, ...) LORA_GROUPED_SHRINK_INSTANCE(__VA_ARGS__);
LORA_GROUPED_SHRINK_VARIANTS(INSTANCE)
LORA_GROUPED_REDUCE_INSTANCE(__nv_bfloat16);
LORA_GROUPED_REDUCE_INSTANCE(__half);

}  // namespace lora_ext::kernel
