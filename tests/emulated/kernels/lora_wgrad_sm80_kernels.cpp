// lora_wgrad_sm80 and lora_reduce_wgrad.
#include "emulated/kernels/lora_wgrad_sm80.h"
#include "emulated/kernels/neighbours.h"

namespace lora_ext::kernel {

#define INSTANCE(variant, ...) LORA_WGRAD_SM80_INSTANCE(__VA_ARGS__);
LORA_WGRAD_SM80_VARIANTS(INSTANCE)
LORA_REDUCE_WGRAD_INSTANCE(__nv_bfloat16);
LORA_REDUCE_WGRAD_INSTANCE(__half);

}  // namespace lora_ext::kernel

namespace kernels {

NEIGHBOUR_COPY(__half);
NEIGHBOUR_COPY(__nv_bfloat16);
NEIGHBOUR_COPY(float);
NEIGHBOUR_PRODUCT(__half);
NEIGHBOUR_PRODUCT(__nv_bfloat16);

}  // namespace kernels
