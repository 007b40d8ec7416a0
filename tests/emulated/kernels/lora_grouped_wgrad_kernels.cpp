// lora_grouped_wgrad and lora_grouped_reduce_wgrad, apart from their host program so that only
// kernels are instrumented.
#include "emulated/kernels/lora_grouped_wgrad.h"

namespace lora_ext::kernel {

#define INSTANCE(variant, ...) LORA_GROUPED_WGRAD_INSTANCE(__VA_ARGS__);
LORA_GROUPED_WGRAD_VARIANTS(INSTANCE)
LORA_GROUPED_REDUCE_WGRAD_INSTANCES(template, __nv_bfloat16);
LORA_GROUPED_REDUCE_WGRAD_INSTANCES(template, __half);

}  // namespace lora_ext::kernel
