// Many adapters on the CPU: the base GEMM of the library over all rows, the low-rank part of each
// adapter in vector code over its own.
#pragma once

#include "common/groups.h"

namespace lora_ext::cpu {

GroupedForward forward(const GroupedForwardArgs& args);
GroupedBackward backward(const GroupedBackwardArgs& args);

}  // namespace lora_ext::cpu
