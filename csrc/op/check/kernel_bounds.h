// How far results of the kernels may be from the op's in float64, element by element, from where
// the kernels round.
#pragma once

#include "common/call.h"

namespace lora_ext::kernel_bounds {

// Every operand in float64, for the library route.
ForwardArgs in_double(const ForwardArgs& args);
BackwardArgs in_double(const BackwardArgs& args);

// Shapes as the results' own; `exact` are the operands in float64, `expected` what comes of them.
// Gradients that are not needed are undefined.
Forward allowed(const ForwardArgs& args, const ForwardArgs& exact, const Forward& expected,
                bool hybrid);
Backward allowed(const BackwardArgs& args, const BackwardArgs& exact, const Backward& expected,
                 bool hybrid);

}  // namespace lora_ext::kernel_bounds
