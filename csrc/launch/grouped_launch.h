// From tensors of a call of many adapters to a planned launch, in the way of kernel_launch.h. Of
// index, offs, ranks and scaling only the addresses are read.
#pragma once

#include "common/groups.h"
#include "launch/kernel_launch.h"

namespace lora_ext::kernel_launch {

plan::Problem problem_of(const GroupedForwardArgs& args);
plan::Problem problem_of(const GroupedBackwardArgs& args);

GroupedForward run(const plan::Plan& plan, const GroupedForwardArgs& args);
GroupedBackward run(const plan::Plan& plan, const GroupedBackwardArgs& args);

}  // namespace lora_ext::kernel_launch
