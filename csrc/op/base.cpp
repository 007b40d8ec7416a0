#include "op/base.h"

#include <ATen/Functions.h>

#include "common/row_blocks.h"
#include "op/flatten.h"

namespace lora_ext {

Base flat_base(const Base& base, at::ScalarType dtype) {
  if (base.is_given()) return Base::given(base.y.defined() ? flattened(base.y) : at::Tensor());
  Base own = base;
  if (base.weight.scalar_type() != dtype) {
    own.weight = base.weight.to(dtype);
    own.packed = own.packed_t = std::nullopt;
  }
  if (base.bias && (base.cast_weight || base.bias->scalar_type() != at::kFloat)) {
    own.bias = base.bias->to(dtype);
  }
  return own;
}

at::Tensor bias_alone(const at::Tensor& x, const Base& base, int64_t out_features) {
  const at::Tensor bias_row =
      base.bias ? base.bias->to(x.scalar_type()) : at::zeros({out_features}, x.options());
  at::Tensor y = at::empty(with_last(x, out_features), x.options());
  if (y.numel() != 0) y.copy_(bias_row.expand_as(y));
  return y;
}

// On the CPU at::sum makes a wide copy of its operand.
at::Tensor sum_of_rows(const at::Tensor& grad, int64_t columns, at::ScalarType wide) {
  at::Tensor sum = at::zeros({columns}, grad.options().dtype(wide));
  if (grad.numel() == 0) return sum;
  const at::Tensor rows = flattened(grad);
  if (!rows.is_cpu() || rows.scalar_type() == wide) return at::sum(rows, {0}, false, wide);
  for_row_blocks(rows, columns, wide, [&](int64_t row, int64_t count) {
    sum.add_(at::sum(rows.narrow(0, row, count), {0}, false, wide));
  });
  return sum;
}

}  // namespace lora_ext
