// The kernels multiply halves exactly and add in float32. They round
//   - Y and dX, and the adapters' gradients where those are half: once, by u;
//   - s S and dS: once, by u, with half adapters; with float adapters they are kept as two halves,
//     as are A and B, which loses u^2 each, and the product of both second halves (lo lo) is left
//     out: four such losses in S, in dS and in the results computed from them;
//   - in a hybrid plan, the low-rank product once more, by u, before the base product is added onto
//     it; and the library may add parts of the base product in half;
//   - each sum of d products, in any order and also where tensor cores truncate: by less than
//     d 2^-23 of its intermediate size.
// Rounding errors of different numbers are independent, so in a sum of products they add up to the
// root of the sum of squares of the products; kMax is well above the error of the worst of 300,000
// elements, and below the error that one missing second half causes.
#include "op/check/kernel_bounds.h"

#include <ATen/ops/arange.h>
#include <ATen/ops/full_like.h>
#include <ATen/ops/mm.h>
#include <ATen/ops/zeros.h>
#include <ATen/ops/zeros_like.h>

#include <limits>

namespace lora_ext::kernel_bounds {
namespace {

constexpr double kMax = 8;

struct Roundings {
  double half;        // rounding of a result to x's dtype
  double low_rank;    // rounding of S and dS, as factors in a sum
  double of_s;        // rounding of S itself, which is kept in float
  double once_more;   // hybrid: rounding of the low-rank product
  double base;        // hybrid: rounding of the base product, in a sum
  double of_adapter;  // rounding of a gradient to the adapter's dtype

  template <class Args>
  Roundings(const Args& args, bool hybrid) {
    const KernelDtype& type = kernel_dtype(dtype_of(args.x.scalar_type()));
    const bool float_adapters = args.update.a().scalar_type() == at::kFloat;
    half = type.rounding;
    const double two_halves = 4 * type.of_two;
    low_rank = kMax * (float_adapters ? two_halves : half);
    of_s = float_adapters ? low_rank : 0;
    once_more = base = hybrid ? kMax * half : 0;
    of_adapter = float_adapters ? 0 : half;
  }
};

double sum_of(int64_t products) { return static_cast<double>(products) * 0x1p-23; }

// factor times the root of the sum of the squares of the products that p q sums.
at::Tensor spread(const at::Tensor& p, const at::Tensor& q, double factor = 1) {
  return at::mm(p.square(), q.square()).sqrt_().mul_(factor);
}

// The bound of Y or dX: base is the spread of the base product, low that of the low-rank product.
at::Tensor allowed_of(const at::Tensor& result, const at::Tensor& base, const at::Tensor& low,
                      int64_t products, const Roundings& rounding) {
  const double sum = sum_of(products);
  return result.abs()
      .mul_(rounding.half)
      .add_(base, rounding.base + sum)
      .add_(low, rounding.low_rank + rounding.once_more + sum);
}

at::Tensor allowed_of_gradient(const at::Tensor& result, const at::Tensor& products, int64_t count,
                               const Roundings& rounding) {
  return result.abs().mul_(rounding.of_adapter).add_(products, rounding.low_rank + sum_of(count));
}

Update in_double(const Update& update) {
  Update exact = update;
  for (Factors* factors : {&exact.lora_a, &exact.lora_b}) {
    for (at::Tensor& factor : *factors) factor = factor.to(at::kDouble);
  }
  return exact;
}

// ---- many adapters: the bounds for one, applied to the rows and gradients of each ----

// The rows of an adapter; for -1, the rows without an adapter, of which experts have none: zeros.
at::Tensor rows_of(const Update& update, int64_t adapter) {
  const Grouping& many = *update.grouping;
  if (!update.experts()) return many.index->reshape({-1}).eq(adapter).nonzero().reshape({-1});
  const auto end = [&](int64_t g) { return g < 0 ? 0 : (*many.offs)[g].item<int64_t>(); };
  return at::arange(end(adapter - 1), end(adapter), many.offs->options().dtype(at::kLong));
}

ExpertRows experts_of(const Update& update) {
  return update.experts() != nullptr ? *update.experts() : ExpertRows{};
}

// Of x or of grad, the rows that sorted rows are.
at::Tensor at_rows(const at::Tensor& tensor, const at::Tensor& rows,
                   const std::optional<at::Tensor>& places) {
  return tensor.index_select(0, places ? places->index_select(0, rows) : rows);
}

// Of x or S, in gradients of factors.
at::Tensor weighted(const at::Tensor& own, const at::Tensor& rows, const ExpertRows& experts) {
  if (!experts.weights) return own;
  return own.mul(experts.row_weights().index_select(0, rows).unsqueeze(1)).to(own.scalar_type());
}

// One adapter, for the bounds of a call with one adapter. They hold for any mask: what it drops
// only makes the sums smaller.
Update update_of(const Update& update, int64_t g) {
  const auto of = [&](const Factors& factors) {
    return update.is_pool() ? factors[0][g] : factors[static_cast<size_t>(g)];
  };
  const at::Tensor& scaling = update.grouping->scaling;
  return Update::one(of(update.lora_a), of(update.lora_b),
                     scaling.defined() ? scaling[g].item<double>() : update.scaling,
                     update.dropout);
}

// No update: factors of zeros.
Update no_update(const Update& update) {
  return Update::one(at::zeros({1, update.in_features()}, update.lora_a[0].options()),
                     at::zeros({update.out_features(), 1}, update.lora_b[0].options()), 1.0);
}

Base base_of(const Base& base, const ExpertRows& experts, int64_t g, const at::Tensor& rows) {
  if (base.of_experts()) return base.of(experts.expert_of(g));
  Base own = base;
  if (base.y.defined()) own.y = base.y.index_select(0, rows);
  return own;
}

// S is not written in rows without an adapter, nor in columns beyond the adapter's rank: any value
// is allowed there.
Forward allowed_grouped(const ForwardArgs& args, const ForwardArgs& exact, const Forward& expected,
                        bool hybrid) {
  Forward out{at::zeros_like(expected.y),
              at::full_like(expected.s, std::numeric_limits<double>::infinity())};
  const ExpertRows experts = experts_of(args.update);
  for (int64_t g = -1; g < args.update.adapters(); ++g) {
    const at::Tensor rows = rows_of(args.update, g);
    if (rows.numel() == 0) continue;
    const Update own = g < 0 ? no_update(args.update) : update_of(args.update, g);
    const Update own_exact = g < 0 ? no_update(exact.update) : update_of(exact.update, g);
    const Forward part =
        allowed({at_rows(args.x, rows, experts.x), base_of(args.base, experts, g, rows), own},
                ForwardArgs{at_rows(exact.x, rows, experts.x),
                            base_of(exact.base, experts, g, rows), own_exact},
                {expected.y.index_select(0, rows), expected.s}, hybrid);
    out.y.index_copy_(0, rows, part.y);
    if (g >= 0) out.s.narrow(1, 0, own.rank()).index_copy_(0, rows, part.s);
  }
  return out;
}

Backward allowed_grouped(const BackwardArgs& args, const BackwardArgs& exact,
                         const Backward& expected, bool hybrid) {
  Backward out{at::zeros_like(expected.dx), {}, {}};
  const ExpertRows experts = experts_of(args.update);
  for (int64_t g = -1; g < args.update.adapters(); ++g) {
    const at::Tensor rows = rows_of(args.update, g);
    const Update own = g < 0 ? no_update(args.update) : update_of(args.update, g);
    const Update own_exact = g < 0 ? no_update(exact.update) : update_of(exact.update, g);
    const auto of = [&](const BackwardArgs& like, const Update& update, const auto& from) {
      BackwardArgs part = like;
      part.grad = at_rows(from.grad, rows, experts.grad);
      part.x = weighted(at_rows(from.x, rows, experts.x), rows, experts);
      part.base = base_of(from.base, experts, g, rows), part.update = update;
      part.s = weighted(from.s.index_select(0, rows), rows, experts).narrow(1, 0, update.rank());
      part.wanted = Wanted::one(true, g >= 0, g >= 0);
      return part;
    };
    const Backward part = allowed(of({}, own, args), of({}, own_exact, exact),
                                  {expected.dx.index_select(0, rows),
                                   {g < 0 ? at::Tensor() : expected.dlora_a[g]},
                                   {g < 0 ? at::Tensor() : expected.dlora_b[g]}},
                                  hybrid);
    out.dx.index_copy_(0, rows, part.dx);
    if (g < 0) continue;
    out.dlora_a.push_back(part.dlora_a[0]), out.dlora_b.push_back(part.dlora_b[0]);
  }
  return out;
}

}  // namespace

ForwardArgs in_double(const ForwardArgs& args) {
  ForwardArgs exact = args;
  at::Tensor& base = exact.base.is_given() ? exact.base.y : exact.base.weight;
  for (at::Tensor* each : {&exact.x, &base}) *each = each->to(at::kDouble);
  exact.update = in_double(args.update);
  if (exact.base.bias) exact.base.bias = exact.base.bias->to(at::kDouble);
  exact.base.packed = std::nullopt;
  return exact;
}

BackwardArgs in_double(const BackwardArgs& args) {
  BackwardArgs exact = args;
  for (at::Tensor* each : {&exact.grad, &exact.x, &exact.base.weight, &exact.s})
    *each = each->to(at::kDouble);
  exact.update = in_double(args.update);
  exact.base.packed_t = std::nullopt;
  return exact;
}

Forward allowed(const ForwardArgs& args, const ForwardArgs& exact, const Forward& expected,
                bool hybrid) {
  if (!args.update.is_one()) return allowed_grouped(args, exact, expected, hybrid);
  const Roundings rounding(args, hybrid);
  const int64_t k = args.x.size(1), rank = args.update.rank();
  const double keep_scale = args.update.dropout.keep_scale();
  const at::Tensor s = spread(exact.x, exact.update.a().t(), keep_scale);        // [M, r]
  const at::Tensor low = spread(s, exact.update.b().t(), exact.update.scaling);  // [M, N]
  const bool given = args.base.is_given();
  const at::Tensor base = given ? at::zeros_like(low) : spread(exact.x, exact.base.weight.t());
  Forward out{allowed_of(expected.y, base, low, k + rank, rounding),
              s.mul(rounding.of_s + sum_of(k))};
  if (exact.base.bias) out.y.add_(exact.base.bias->abs(), rounding.once_more + sum_of(k + rank));
  if (given) out.y.add_(exact.base.y.abs(), rounding.once_more + sum_of(k + rank));
  return out;
}

Backward allowed(const BackwardArgs& args, const BackwardArgs& exact, const Backward& expected,
                 bool hybrid) {
  if (!args.update.is_one()) return allowed_grouped(args, exact, expected, hybrid);
  const Roundings rounding(args, hybrid);
  const int64_t m = args.x.size(0), n = args.update.out_features(), rank = args.update.rank();
  const double keep_scale = args.update.dropout.keep_scale();
  const at::Tensor ds = spread(exact.grad, exact.update.b(), exact.update.scaling);  // [M, r]
  Backward out = Backward::one();
  if (args.wanted.dx) {
    out.dx = allowed_of(expected.dx, spread(exact.grad, exact.base.weight),
                        spread(ds, exact.update.a(), keep_scale), n + rank, rounding);
  }
  if (args.wanted.any_a()) {
    out.da() = allowed_of_gradient(expected.dlora_a[0], spread(ds.t(), exact.x, keep_scale), m + n,
                                   rounding);
  }
  if (args.wanted.any_b()) {
    out.db() = allowed_of_gradient(
        expected.dlora_b[0], spread(exact.grad.t(), exact.s, exact.update.scaling), m, rounding);
  }
  return out;
}

}  // namespace lora_ext::kernel_bounds
