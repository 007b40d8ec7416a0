// Chooses the route of a call: on CUDA the kernels if the planner chooses them, on the CPU the
// vector code, otherwise the library.
#pragma once

#include "common/call.h"

namespace lora_ext::route {

Forward forward(ForwardArgs args);
Backward backward(const BackwardArgs& args);

}  // namespace lora_ext::route
