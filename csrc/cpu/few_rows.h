// A few rows on the CPU: the factors are read once, in their original layout, since packing them
// would cost more than their products.
#pragma once

#include "common/call.h"

namespace lora_ext::cpu {

// Whether the kernels for few rows can read the factors: lora_a needs unit stride along its columns
// or its rank, lora_b along its rank.
bool lie_for_few_rows(const Update& update);

// Y += s S B^T with S = scale drop(X) A^T, where Y is the result of the base.
Forward forward_few_rows(const ForwardArgs& args);

// dX += mask * (dS A) with dS = s dY B, where dX is that of the base; dA = dS^T drop(X),
// dB = s dY^T S.
Backward backward_few_rows(const BackwardArgs& args);

}  // namespace lora_ext::cpu
