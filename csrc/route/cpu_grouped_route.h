// Many adapters on the CPU: the base GEMM of the library over all rows, the low-rank part of each
// adapter in vector code over its own.
#pragma once

#include "common/call.h"

namespace lora_ext::cpu {

Forward forward_grouped(const ForwardArgs& args);
Backward backward_grouped(const BackwardArgs& args);

}  // namespace lora_ext::cpu
