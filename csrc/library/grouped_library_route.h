// Many adapters in ATen calls, on any device and dtype: a loop over those that have rows, whose
// rows are gathered. It reads the index on the host, so that on a GPU it waits for the device.
#pragma once

#include "common/groups.h"

namespace lora_ext::library_route {

GroupedForward forward(const GroupedForwardArgs& args);
GroupedBackward backward(const GroupedBackwardArgs& args);

}  // namespace lora_ext::library_route
