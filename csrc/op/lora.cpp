// The op layer: lora_ext::lora, lora_grouped, their forwards and backwards. For real tensors on the
// CPU and on CUDA it checks, flattens to 2-D, and calls the route of the device; for torch.compile,
// export and FakeTensor it computes shapes and dtypes without data.
#include <ATen/Functions.h>

#include "common/rows.h"
#include "op/checks.h"
#include "op/ops.h"
#include "op/route/route.h"

namespace lora_ext {
namespace {

// Autocast is decided once, by autocast.cpp; inside, no ATen call may cast again. A backward that
// runs inside `with torch.autocast` would otherwise round float32 adapters.
struct NoAutocast {
  c10::impl::ExcludeDispatchKeyGuard guard{c10::autocast_dispatch_keyset};
};

// [..., C] as [M, C] with unit stride in C; a view wherever the strides allow it.
at::Tensor flattened(const at::Tensor& tensor) {
  if (tensor.dim() == 2 && tensor.stride(1) == 1) return tensor;  // a reshape takes 0.3 us
  const int64_t rows = c10::multiply_integers(tensor.sizes().slice(0, tensor.dim() - 1));
  const at::Tensor flat = tensor.reshape({rows, tensor.size(-1)});
  return flat.stride(1) == 1 ? flat : flat.contiguous();
}

std::vector<int64_t> with_last(const at::Tensor& tensor, int64_t last) {
  std::vector<int64_t> sizes = tensor.sizes().vec();
  sizes.back() = last;
  return sizes;
}

// The base as the routes take it: a given y in 2 dimensions; a weight in x's dtype. A pack has the
// weight's original dtype, so it is not used where the weight is cast. Under autocast the bias is
// rounded as the weight is; otherwise it may be wider than x.
Base flat_base(const Base& base, at::ScalarType dtype) {
  Base own = base;
  if (base.is_given()) {
    if (base.y.defined()) own.y = flattened(base.y);
    return own;
  }
  if (base.weight.scalar_type() != dtype) {
    own.weight = base.weight.to(dtype);
    own.packed = own.packed_t = std::nullopt;
  }
  if (base.bias && (base.cast_weight || base.bias->scalar_type() != at::kFloat)) {
    own.bias = base.bias->to(dtype);
  }
  return own;
}

// y where x or the weight has no elements: the bias in every row.
at::Tensor bias_alone(const at::Tensor& x, const Base& base, int64_t out_features) {
  const at::Tensor bias_row =
      base.bias ? base.bias->to(x.scalar_type()) : at::zeros({out_features}, x.options());
  at::Tensor y = at::empty(with_last(x, out_features), x.options());
  if (y.numel() != 0) y.copy_(bias_row.expand_as(y));
  return y;
}

// The gradient of the bias, [columns]. On the CPU at::sum makes a wide copy of its operand.
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

Forward checked_forward(const at::Tensor& x, const Base& base, const Update& update, bool need_s) {
  const NoAutocast no_autocast;
  check_forward(x, base, update);
  const at::Tensor rows = flattened(x);
  const int64_t out_features = update.out_features();
  if (rows.numel() == 0 || out_features == 0) {
    const auto sums = x.options().dtype(accumulation_dtype(x.scalar_type()));
    return {base.is_given() ? base.y.clone(at::MemoryFormat::Contiguous)
                            : bias_alone(x, base, out_features),
            at::zeros({rows.size(0), update.rank()}, sums)};
  }
  Forward out = route::forward({rows, flat_base(base, x.scalar_type()), update, need_s});
  if (x.dim() != 2) out.y = out.y.view(with_last(x, out_features));
  return out;
}

at::Tensor lora(const at::Tensor& x, const Base& base, const Update& update) {
  return checked_forward(x, base, update, false).y;
}

std::tuple<at::Tensor, at::Tensor> lora_forward(const at::Tensor& x, const Base& base,
                                                const Update& update) {
  Forward out = checked_forward(x, base, update, true);
  return {std::move(out.y), std::move(out.s)};
}

// One gradient for each factor whose gradient is requested.
std::vector<at::Tensor> zeros_of(at::TensorList factors, const NeedsGrad& wanted) {
  std::vector<at::Tensor> out;
  for (size_t i = 0; i < factors.size(); ++i) {
    if (wanted[i]) out.push_back(at::zeros(factors[i].sizes(), factors[i].options()));
  }
  return out;
}

std::vector<at::Tensor> defined_of(at::TensorList gradients) {
  std::vector<at::Tensor> out;
  for (const at::Tensor& gradient : gradients) {
    if (gradient.defined()) out.push_back(gradient);
  }
  return out;
}

Gradients lora_backward(const at::Tensor& grad, const at::Tensor& s, const Wanted& wanted,
                        const at::Tensor& x, const Base& base, const Update& update) {
  const NoAutocast no_autocast;
  check_backward(grad, s, wanted, x, base, update);
  const at::ScalarType dtype = x.scalar_type();
  at::Tensor dbias;
  if (wanted.dbias) dbias = sum_of_rows(grad, base.weight.size(0), accumulation_dtype(dtype));
  if (x.numel() == 0 || grad.numel() == 0) {
    return {wanted.dx ? at::zeros(x.sizes(), x.options()) : at::Tensor(),
            zeros_of(update.lora_a, wanted.dlora_a), zeros_of(update.lora_b, wanted.dlora_b),
            dbias};
  }
  if (!wanted.any()) return {{}, {}, {}, dbias};
  Backward out = route::backward({flattened(base.is_given() ? grad : grad.to(dtype)), flattened(x),
                                  flat_base(base, dtype), update, s.contiguous(), wanted});
  if (wanted.dx && x.dim() != 2) out.dx = out.dx.view(x.sizes());
  return {wanted.dx ? out.dx : at::Tensor(), defined_of(out.dlora_a), defined_of(out.dlora_b),
          dbias};
}

// ---- without data ----

at::Tensor unfilled(c10::SymIntArrayRef sizes, const at::Tensor& like, at::ScalarType dtype) {
  return at::empty_symint(sizes, like.options().dtype(dtype));
}

at::Tensor unfilled_like(const at::Tensor& tensor) {
  return unfilled(tensor.sym_sizes(), tensor, tensor.scalar_type());
}

std::vector<at::Tensor> unfilled_of(at::TensorList factors, const NeedsGrad& wanted) {
  std::vector<at::Tensor> out;
  for (size_t i = 0; i < factors.size(); ++i) {
    if (wanted[i]) out.push_back(unfilled_like(factors[i]));
  }
  return out;
}

std::tuple<at::Tensor, at::Tensor> lora_forward_meta(const at::Tensor& x, const Base& base,
                                                     const Update& update) {
  check_forward(x, base, update);
  return {base.is_given() ? unfilled_like(base.y)
                          : unfilled(sym_with_last(x, base.weight.sym_size(0)), x, x.scalar_type()),
          unfilled({sym_rows(x), update.sym_rank()}, x, accumulation_dtype(x.scalar_type()))};
}

at::Tensor lora_meta(const at::Tensor& x, const Base& base, const Update& update) {
  return std::get<0>(lora_forward_meta(x, base, update));
}

Gradients lora_backward_meta(const at::Tensor& grad, const at::Tensor& s, const Wanted& wanted,
                             const at::Tensor& x, const Base& base, const Update& update) {
  check_backward(grad, s, wanted, x, base, update);
  at::Tensor dbias;
  if (wanted.dbias) {
    dbias = unfilled({base.weight.sym_size(0)}, grad, accumulation_dtype(x.scalar_type()));
  }
  return {wanted.dx ? unfilled_like(x) : at::Tensor(), unfilled_of(update.lora_a, wanted.dlora_a),
          unfilled_of(update.lora_b, wanted.dlora_b), dbias};
}

}  // namespace

TORCH_LIBRARY_IMPL(lora_ext, CPU, m) { register_all<lora, lora_forward, lora_backward>(m); }
// A packed weight is an mkldnn tensor, whose key goes before the CPU's.
TORCH_LIBRARY_IMPL(lora_ext, MkldnnCPU, m) { register_all<lora, lora_forward, lora_backward>(m); }
TORCH_LIBRARY_IMPL(lora_ext, CUDA, m) { register_all<lora, lora_forward, lora_backward>(m); }
TORCH_LIBRARY_IMPL(lora_ext, Meta, m) {
  register_all<lora_meta, lora_forward_meta, lora_backward_meta>(m);
}

}  // namespace lora_ext
