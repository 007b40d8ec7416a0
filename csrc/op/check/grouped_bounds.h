// Error bounds for the kernels with many adapters, against the op in float64: the bounds of
// kernel_bounds.h, applied to the rows and gradients of each adapter.
#pragma once

#include "common/call.h"

namespace lora_ext::kernel_bounds {

Forward allowed_grouped(const ForwardArgs& args, const ForwardArgs& exact, const Forward& expected,
                        bool hybrid);
Backward allowed_grouped(const BackwardArgs& args, const BackwardArgs& exact,
                         const Backward& expected, bool hybrid);

}  // namespace lora_ext::kernel_bounds
