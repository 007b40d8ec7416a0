// lora_grouped_gemm_sm80, apart from its host program so that only kernels are instrumented.
#include "emulated/kernels/lora_grouped_gemm.h"

namespace lora_ext::kernel {

#define INSTANCE(variant, ...) LORA_GROUPED_GEMM_INSTANCE(__VA_ARGS__);
LORA_GROUPED_GEMM_VARIANTS(INSTANCE)

}  // namespace lora_ext::kernel
