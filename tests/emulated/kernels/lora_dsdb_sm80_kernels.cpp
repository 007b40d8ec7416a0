// lora_dsdb_sm80.
#include "emulated/kernels/lora_dsdb_sm80.h"

namespace lora_ext::kernel {

#define INSTANCE(variant, ...) LORA_DSDB_SM80_INSTANCE(__VA_ARGS__);
LORA_DSDB_SM80_VARIANTS(INSTANCE)

}  // namespace lora_ext::kernel
