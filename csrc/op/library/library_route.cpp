// The LoRA linear in ATen calls.
//
// Adapters in the activation dtype: the low-rank product accumulates in place. On the CPU the base
// comes first (addmm_ reads what at::linear wrote); on CUDA the expand comes first and the base
// GEMM accumulates onto it with beta = 1, which saves the pass that a separate add would make.
//
// Adapters wider than the activations (and half adapters in the CPU's backward), or a given y whose
// dtype is not x's: row blocks in the widest dtype, in PEFT's order of operations (base rounded,
// delta scaled, added in the wide dtype, rounded), so that Y and dX have PEFT's bits. rows.h
// bounds the wide copies of x, of dY, of the base and of an update; at most two exist at a time, so
// no temporary grows with the number of rows.
#include "op/library/library_route.h"

#include <ATen/ops/addmm.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/mm.h>
#include <ATen/ops/mul.h>
#include <ATen/ops/zeros.h>

#include "common/base_linear.h"
#include "common/rows.h"

namespace lora_ext::library_route {
namespace {

// Whether x, the adapters and y have the same dtype.
bool is_of_one_dtype(const at::Tensor& x, const Update& update, at::ScalarType y) {
  return x.scalar_type() == update.a().scalar_type() && x.scalar_type() == y;
}

// The adapters in the dtype in which sums are computed.
Update widened(const Update& update, at::ScalarType y) {
  const at::ScalarType wide = accumulation_dtype(c10::promoteTypes(update.a().scalar_type(), y));
  Update own = update;
  own.lora_a = {update.a().to(wide)}, own.lora_b = {update.b().to(wide)};
  return own;
}

// The CPU library's small half GEMMs round intermediate sums (rms error of dX 1.17 times PEFT's):
// there the low-rank part of backward runs in float for adapters of any dtype.
bool half_on_cpu(const at::Tensor& x) { return x.is_cpu() && is_half(x.scalar_type()); }

// drop(X) of some rows, in the adapters' dtype.
template <class Args>
at::Tensor wide_rows(const Args& args, int64_t row, int64_t count) {
  const at::Tensor rows = args.x.narrow(0, row, count);
  const bool drop = args.update.dropout.enabled();
  if (rows.scalar_type() == args.update.a().scalar_type())
    return drop ? dropped(rows, args.update.dropout, row) : rows;
  at::Tensor x = rows.to(args.update.a().scalar_type());
  if (drop) drop_(x, args.update.dropout, row);
  return x;
}

// s dY of some rows, in the adapters' dtype.
at::Tensor scaled_rows(const BackwardArgs& args, int64_t row, int64_t count) {
  const at::Tensor rows = args.grad.narrow(0, row, count);
  const at::ScalarType wide = args.update.a().scalar_type();
  if (rows.scalar_type() == wide) return at::mul(rows, args.update.scaling);
  return rows.to(wide).mul_(args.update.scaling);
}

Forward forward_wide(const ForwardArgs& args) {
  const at::ScalarType wide = args.update.a().scalar_type();
  Forward out{base_forward(args.x, args.base),
              at::empty({args.x.size(0), args.update.rank()}, args.update.a().options())};
  const int64_t columns = std::max(args.x.size(1), out.y.size(1));
  for_row_blocks(args.x, columns, wide, [&](int64_t row, int64_t count) {
    at::Tensor s = out.s.narrow(0, row, count);
    at::mm_out(s, wide_rows(args, row, count), args.update.a().t());
    at::Tensor y = out.y.narrow(0, row, count);
    y.copy_(at::mm(s, args.update.b().t()).mul_(args.update.scaling).add_(y));
  });
  if (args.need_s) out.s = out.s.to(accumulation_dtype(args.x.scalar_type()));
  return out;
}

Forward forward_same(const ForwardArgs& args) {
  const bool drop = args.update.dropout.enabled();
  const at::Tensor s =
      at::mm(drop ? dropped(args.x, args.update.dropout, 0) : args.x, args.update.a().t());
  at::Tensor y;
  if (args.base.is_given()) {
    y = at::addmm(args.base.y, s, args.update.b().t(), 1, args.update.scaling);
  } else if (args.x.is_cpu() || args.base.packed) {
    y = base_forward(args.x, args.base);
    y.addmm_(s, args.update.b().t(), 1, args.update.scaling);
  } else {
    y = at::empty({args.x.size(0), args.update.out_features()}, args.x.options());
    // beta = 0 ignores the old values of y; the scaling is the GEMM's alpha.
    const at::Tensor& start = args.base.bias ? *args.base.bias : y;
    at::addmm_out(y, start, s, args.update.b().t(), args.base.bias ? 1 : 0, args.update.scaling);
    add_base_forward(y, args.x, args.base);
  }
  return {y, args.need_s ? s.to(accumulation_dtype(s.scalar_type())) : s};
}

// Whether dlora_b is computed as (S^T dY)^T: for r <= 8 MKL's gemm is 8 times slower without the
// transposition. For larger r the transposition costs more than it saves.
bool transposed_dlora_b(const at::Tensor& s) { return s.size(1) <= 8; }

Backward backward_wide(const BackwardArgs& args) {
  const at::TensorOptions wide = args.update.a().options();
  Backward out = Backward::one();
  if (args.wanted.any_a()) out.da() = at::zeros(args.update.a().sizes(), wide);
  const bool transposed = transposed_dlora_b(args.s);
  at::Tensor dlora_b_t;  // [r, N]
  if (args.wanted.any_b()) {
    dlora_b_t = transposed ? at::zeros({args.update.b().size(1), args.update.b().size(0)}, wide)
                           : at::zeros(args.update.b().sizes(), wide).t();
  }
  if (args.wanted.dx) out.dx = base_backward(args.grad, args.x, args.base);
  const int64_t columns = std::max(args.x.size(1), args.grad.size(1));
  for_row_blocks(args.x, columns, wide.dtype().toScalarType(), [&](int64_t row, int64_t count) {
    at::Tensor grad = scaled_rows(args, row, count);
    if (args.wanted.any_b()) {
      const at::Tensor s = args.s.narrow(0, row, count).to(wide);
      if (transposed) {
        dlora_b_t.addmm_(s.t(), grad);
      } else {
        dlora_b_t.t().addmm_(grad.t(), s);
      }
    }
    if (!args.wanted.any_a() && !args.wanted.dx) return;
    const at::Tensor ds = at::mm(grad, args.update.b());
    grad.reset();
    if (args.wanted.any_a()) {
      out.da().addmm_(ds.t(), wide_rows(args, row, count));
    }
    if (args.wanted.dx) {
      at::Tensor delta = at::mm(ds, args.update.a());
      if (args.update.dropout.enabled()) drop_(delta, args.update.dropout, row);
      // PEFT's autograd rounds the delta in the backward of the cast of x, then adds it.
      out.dx.narrow(0, row, count).add_(delta.to(out.dx.scalar_type()));
    }
  });
  if (args.wanted.any_b()) out.db() = dlora_b_t.t().contiguous();
  return out;
}

// scaling * a b. On half tensors mul_(scaling) would round the scaling itself to half; a GEMM's
// alpha stays float. beta = 0 ignores the old values of the output.
at::Tensor scaled_mm(const at::Tensor& a, const at::Tensor& b, double scaling) {
  at::Tensor out = at::empty({a.size(0), b.size(1)}, a.options());
  return at::addmm_out(out, out, a, b, 0, scaling);
}

Backward backward_same(const BackwardArgs& args) {
  Backward out = Backward::one();
  if (args.wanted.any_b()) {
    const at::Tensor s = args.s.to(args.grad.scalar_type());
    out.db() = transposed_dlora_b(s)
                   ? scaled_mm(s.t(), args.grad, args.update.scaling).t().contiguous()
                   : scaled_mm(args.grad.t(), s, args.update.scaling);
  }
  const bool given = args.base.is_given();
  if (args.wanted.dx && !given) out.dx = base_backward(args.grad, args.x, args.base);
  if (!args.wanted.any_a() && !args.wanted.dx) return out;
  const at::Tensor ds = scaled_mm(args.grad, args.update.b(), args.update.scaling);
  const bool drop = args.update.dropout.enabled();
  if (args.wanted.any_a()) {
    out.da() = at::mm(ds.t(), drop ? dropped(args.x, args.update.dropout, 0) : args.x);
  }
  if (args.wanted.dx) {
    if (drop || given) {
      at::Tensor delta = at::mm(ds, args.update.a());
      if (drop) drop_(delta, args.update.dropout, 0);
      out.dx = given ? delta : out.dx.add_(delta);
    } else {
      out.dx.addmm_(ds, args.update.a());
    }
  }
  return out;
}

}  // namespace

Forward forward(const ForwardArgs& args) {
  if (!args.update.is_one()) return forward_grouped(args);
  if (is_of_one_dtype(args.x, args.update, args.y_dtype())) return forward_same(args);
  ForwardArgs wide = args;
  wide.update = widened(args.update, args.y_dtype());
  return forward_wide(wide);
}

Backward backward(const BackwardArgs& args) {
  if (!args.update.is_one()) return backward_grouped(args);
  const at::ScalarType dtype = args.grad.scalar_type();
  if (is_of_one_dtype(args.x, args.update, dtype) && !half_on_cpu(args.x))
    return backward_same(args);
  BackwardArgs wide = args;
  wide.update = widened(args.update, dtype);
  Backward out = backward_wide(wide);
  const at::ScalarType adapters = args.update.a().scalar_type();
  if (args.wanted.any_a()) out.da() = out.da().to(adapters);
  if (args.wanted.any_b()) out.db() = out.db().to(adapters);
  return out;
}

}  // namespace lora_ext::library_route
