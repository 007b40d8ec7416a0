// Error bounds for the kernels against the op in float64, for each element, derived from the places
// where the kernels round.
#pragma once

#include "common/call.h"

namespace lora_ext::kernel_bounds {

// Every operand in float64, for the library route.
ForwardArgs in_double(const ForwardArgs& args);
BackwardArgs in_double(const BackwardArgs& args);

// The bounds have the shapes of the results; `exact` are the operands in float64, `expected` the
// results for them. Gradients that are not needed are undefined.
Forward allowed(const ForwardArgs& args, const ForwardArgs& exact, const Forward& expected,
                bool hybrid);
Backward allowed(const BackwardArgs& args, const BackwardArgs& exact, const Backward& expected,
                 bool hybrid);

}  // namespace lora_ext::kernel_bounds
