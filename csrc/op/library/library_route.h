// The library route: the LoRA linear in ATen calls, on any device and dtype.
#pragma once

#include "common/call.h"

namespace lora_ext::library_route {

Forward forward(const ForwardArgs& args);
Backward backward(const BackwardArgs& args);

}  // namespace lora_ext::library_route
