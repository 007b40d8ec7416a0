// A call in blocks of base.row_block rows, that all have the same number of rows, so that what a
// row gets is the same in a call of any number: a library chooses its kernels, and a route its
// passes, by the rows.
#pragma once

#include "common/call.h"

namespace lora_ext::route {

// Y and S. A pack of the weight is not used.
Forward forward_in_blocks(const ForwardArgs& args);
// dX in blocks; dA and dB, which are sums over all rows, in one.
Backward backward_in_blocks(const BackwardArgs& args);

}  // namespace lora_ext::route
