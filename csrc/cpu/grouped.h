// Many adapters on the CPU: the base GEMM by the library over all rows, the low-rank part of each
// adapter in vector code over the adapter's rows.
#pragma once

#include <optional>

#include "common/call.h"

namespace lora_ext::cpu {

// nullopt if the library computes the call.
std::optional<Forward> forward_grouped(const ForwardArgs& args);
std::optional<Backward> backward_grouped(const BackwardArgs& args);

}  // namespace lora_ext::cpu
