// lora_shrink_sm80 and lora_reduce, apart from their host program so that only
// kernels are instrumented.
#include "emulated/kernels/lora_shrink_sm80.h"

namespace lora_ext::kernel {

#define INSTANCE(variant, ...) LORA_SHRINK_SM80_INSTANCE(__VA_ARGS__);
LORA_SHRINK_SM80_VARIANTS(INSTANCE)
LORA_REDUCE_INSTANCE(__nv_bfloat16);
LORA_REDUCE_INSTANCE(__half);

}  // namespace lora_ext::kernel
