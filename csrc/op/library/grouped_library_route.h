// Many adapters in ATen calls, on any device and dtype: a loop over those that have rows, whose
// rows are gathered. It reads the index on the host, so that on a GPU it waits for the device.
#pragma once

#include "common/call.h"

namespace lora_ext::library_route {

Forward forward_grouped(const ForwardArgs& args);
Backward backward_grouped(const BackwardArgs& args);

}  // namespace lora_ext::library_route
