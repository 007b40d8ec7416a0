// The LoRA linear on the CPU: the base GEMM of the library, the low-rank part in vector code.
#pragma once

#include <string>

#include "common/call.h"

namespace lora_ext::cpu {

// Why a forward takes the library route, or an empty string when the vector kernels take it.
std::string library_reason(int64_t rows, int64_t rank, at::ScalarType x);

Forward forward(const ForwardArgs& args);
Backward backward(const BackwardArgs& args);

}  // namespace lora_ext::cpu
