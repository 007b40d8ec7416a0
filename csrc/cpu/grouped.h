// Many adapters on the CPU: the base GEMM of the library over all rows, the low-rank part of each
// adapter in vector code over its own.
#pragma once

#include <optional>

#include "common/call.h"

namespace lora_ext::cpu {

// nullopt where the library takes the call.
std::optional<Forward> forward_grouped(const ForwardArgs& args);
std::optional<Backward> backward_grouped(const BackwardArgs& args);

}  // namespace lora_ext::cpu
