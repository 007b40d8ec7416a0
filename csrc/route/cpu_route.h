// The LoRA linear on the CPU: the base GEMM of the library, the low-rank part in vector code.
#pragma once

#include <string>

#include "common/call.h"

namespace lora_ext::cpu {

// Why a call takes the library route, or an empty string when the vector kernels take it.
std::string library_reason(at::ScalarType x, int64_t rank);

Forward forward(const ForwardArgs& args);
Backward backward(const BackwardArgs& args);

}  // namespace lora_ext::cpu
