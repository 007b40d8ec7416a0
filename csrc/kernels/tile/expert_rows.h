// Which rows each expert of a mixture has, as offs says: expert e those from offs[e - 1] to offs[e].
#pragma once
#include "ptx/target.h"

namespace lora_ext::kernel {

// With null for offs every expert has.
__device__ __forceinline__ bool has_rows(const int* offs, int expert) {
  return offs == nullptr || offs[expert] > (expert == 0 ? 0 : offs[expert - 1]);
}

}  // namespace lora_ext::kernel
