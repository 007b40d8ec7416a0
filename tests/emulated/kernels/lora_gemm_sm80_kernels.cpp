// lora_gemm_sm80, apart from its host program so that only kernels are
// instrumented.
#include "emulated/kernels/lora_gemm_sm80.h"

namespace lora_ext::kernel {

#define INSTANCE(variant, ...) LORA_GEMM_SM80_INSTANCE(__VA_ARGS__);
LORA_GEMM_SM80_VARIANTS(INSTANCE)

}  // namespace lora_ext::kernel
