// A call's base as the op prepares it for the routes, and what it alone decides.
#pragma once

#include "common/call.h"

namespace lora_ext {

// The base as the routes take it: a given y in 2 dimensions; a weight in x's dtype. A pack is in
// the weight's own: no use where that is cast. Under autocast the bias is rounded as the weight is;
// else it may be wider than x.
Base flat_base(const Base& base, at::ScalarType dtype);

// y of an x or a weight without an element.
at::Tensor bias_alone(const at::Tensor& x, const Base& base, int64_t out_features);

// The gradient of a bias, [columns].
at::Tensor sum_of_rows(const at::Tensor& grad, int64_t columns, at::ScalarType wide);

}  // namespace lora_ext
