// A few rows on the CPU: the factors are read as they lie, once, since packing them would cost more
// than their products.
#pragma once

#include "common/call.h"

namespace lora_ext::cpu {

// Whether the factors lie as the kernels of few rows read them: a along its columns or its rank, b
// along its rank.
bool lie_for_few_rows(const Update& update);

// Y += s S B^T with S = scale drop(X) A^T, where Y is the base's.
Forward forward_few_rows(const ForwardArgs& args);

// dX += mask * (dS A) with dS = s dY B, where dX is the base's; dA = dS^T drop(X), dB = s dY^T S.
Backward backward_few_rows(const BackwardArgs& args);

}  // namespace lora_ext::cpu
