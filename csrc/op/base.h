// The base of a call as the op prepares it for the routes, and the results that depend on the base
// alone.
#pragma once

#include "common/call.h"

namespace lora_ext {

// The base as the routes take it: a given y in 2 dimensions; a weight in x's dtype. A pack has the
// weight's original dtype, so it is not used where the weight is cast. Under autocast the bias is
// rounded as the weight is; otherwise it may be wider than x.
Base flat_base(const Base& base, at::ScalarType dtype);

// y where x or the weight has no elements: the bias in every row.
at::Tensor bias_alone(const at::Tensor& x, const Base& base, int64_t out_features);

// The gradient of the bias, [columns].
at::Tensor sum_of_rows(const at::Tensor& grad, int64_t columns, at::ScalarType wide);

}  // namespace lora_ext
