// dequantize_4bit and dequantize_8bit.
#include "emulated/kernels/dequantize.h"

namespace lora_ext::kernel {

#define INSTANCES(variant, ...) DEQUANTIZE_INSTANCES(template, __VA_ARGS__)
DEQUANTIZE_VARIANTS(INSTANCES)

}  // namespace lora_ext::kernel
