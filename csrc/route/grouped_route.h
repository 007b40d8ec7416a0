// Which way a call of many adapters takes.
#pragma once

#include "common/groups.h"

namespace lora_ext::route {

GroupedForward forward(GroupedForwardArgs args);
GroupedBackward backward(const GroupedBackwardArgs& args);

}  // namespace lora_ext::route
