// The LoRA linear on the CPU: the base GEMM by the library, the low-rank part in vector code.
#pragma once

#include <optional>
#include <string>

#include "common/call.h"

namespace lora_ext::cpu {

// Why a call takes the library route, or "" if the vector kernels compute it.
std::string library_reason(at::ScalarType x, int64_t rank);

// nullopt if the library computes the call.
std::optional<Forward> forward(const ForwardArgs& args);
std::optional<Backward> backward(const BackwardArgs& args);

}  // namespace lora_ext::cpu
