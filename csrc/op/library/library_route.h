// The library route: the LoRA linear in ATen calls, on any device and dtype.
#pragma once

#include "common/call.h"

namespace lora_ext::library_route {

Forward forward(const ForwardArgs& args);
Backward backward(const BackwardArgs& args);

// Many adapters: a loop over those that have rows, which gathers the rows of each. It reads the
// index on the host, so on a GPU it waits for the device.
Forward forward_grouped(const ForwardArgs& args);
Backward backward_grouped(const BackwardArgs& args);

}  // namespace lora_ext::library_route
