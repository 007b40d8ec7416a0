// nvcc takes minutes for all instances: setup.py compiles this file once for each part and type,
// which it gives as macros, so that they compile in parallel. Without macros it has all instances.
#include "kernels/launch/instances.h"

namespace lora_ext::kernel {

#ifdef LORA_EXT_PART
LORA_EXT_PART(template, LORA_EXT_TYPE)
#else
LORA_EXT_ALL(template, __nv_bfloat16)
LORA_EXT_ALL(template, __half)
#endif

}  // namespace lora_ext::kernel
