// The route of a call: on CUDA the kernels where the planner chooses them, on the CPU the vector
// code, else the library.
#pragma once

#include "common/call.h"

namespace lora_ext::route {

Forward forward(ForwardArgs args);
Backward backward(const BackwardArgs& args);

}  // namespace lora_ext::route
