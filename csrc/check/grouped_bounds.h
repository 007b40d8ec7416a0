// How far results of the kernels of many adapters may be from the op's in float64: for each
// adapter's rows and gradients as kernel_bounds.h says.
#pragma once

#include "common/groups.h"

namespace lora_ext::kernel_bounds {

// Every operand in float64, for the library route.
GroupedForwardArgs in_double(const GroupedForwardArgs& args);
GroupedBackwardArgs in_double(const GroupedBackwardArgs& args);

GroupedForward allowed(const GroupedForwardArgs& args, const GroupedForwardArgs& exact,
                       const GroupedForward& expected, bool hybrid);
GroupedBackward allowed(const GroupedBackwardArgs& args, const GroupedBackwardArgs& exact,
                        const GroupedBackward& expected, bool hybrid);

}  // namespace lora_ext::kernel_bounds
