// lora_grouped_segments' kernels, apart from their host program so that only kernels are
// instrumented.
#include "emulated/kernels/lora_grouped_segments.h"

namespace lora_ext::kernel {

LORA_GROUPED_SEGMENTS_INSTANCES(template);

}  // namespace lora_ext::kernel
