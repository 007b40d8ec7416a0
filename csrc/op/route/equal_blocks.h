// Computes a call in blocks that all have base.row_block rows, so that the result of a row is the
// same in a call with any number of rows. Otherwise the library chooses its kernels, and a route
// its passes, by the number of rows.
#pragma once

#include "common/call.h"

namespace lora_ext::route {

// Y and S. A pack of the weight is not used.
Forward forward_in_blocks(const ForwardArgs& args);
// dX in blocks; dA and dB, which are sums over all rows, in one.
Backward backward_in_blocks(const BackwardArgs& args);

}  // namespace lora_ext::route
