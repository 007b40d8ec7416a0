// Many adapters in ATen calls, on any device and dtype: a loop over the adapters that have rows,
// which gathers the rows of each. It reads the index on the host, so on a GPU it waits for the
// device.
#pragma once

#include "common/call.h"

namespace lora_ext::library_route {

Forward forward_grouped(const ForwardArgs& args);
Backward backward_grouped(const BackwardArgs& args);

}  // namespace lora_ext::library_route
