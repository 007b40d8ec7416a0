// How far results of the kernels of many adapters may be from the op's in float64: for each
// adapter's rows and gradients as kernel_bounds.h says.
#pragma once

#include "common/call.h"

namespace lora_ext::kernel_bounds {

Forward allowed_grouped(const ForwardArgs& args, const ForwardArgs& exact, const Forward& expected,
                        bool hybrid);
Backward allowed_grouped(const BackwardArgs& args, const BackwardArgs& exact,
                         const Backward& expected, bool hybrid);

}  // namespace lora_ext::kernel_bounds
