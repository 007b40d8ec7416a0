// S is not written in rows without an adapter, nor in columns beyond the adapter's rank: any value
// is allowed there.
#include "op/check/grouped_bounds.h"

#include <ATen/ops/full_like.h>
#include <ATen/ops/zeros.h>
#include <ATen/ops/zeros_like.h>

#include <limits>

#include "op/check/kernel_bounds.h"

namespace lora_ext::kernel_bounds {
namespace {

// The rows of an adapter; for -1, the rows without an adapter.
at::Tensor rows_of(const Update& update, int64_t adapter) {
  return update.grouping->index->reshape({-1}).eq(adapter).nonzero().reshape({-1});
}

// One adapter, for the bounds of a call with one adapter. They hold for any mask: what it drops
// only makes the sums smaller.
Update update_of(const Update& update, int64_t g) {
  return Update::one(update.lora_a[g], update.lora_b[g], update.grouping->scaling[g].item<double>(),
                     update.dropout);
}

// No update: factors of zeros.
Update no_update(const Update& update) {
  return Update::one(at::zeros({1, update.in_features()}, update.lora_a[0].options()),
                     at::zeros({update.out_features(), 1}, update.lora_b[0].options()), 1.0);
}

Base base_of(const Base& base, const at::Tensor& rows) {
  Base own = base;
  if (base.is_given()) own.y = base.y.index_select(0, rows);
  return own;
}

}  // namespace

Forward allowed_grouped(const ForwardArgs& args, const ForwardArgs& exact, const Forward& expected,
                        bool hybrid) {
  Forward out{at::zeros_like(expected.y),
              at::full_like(expected.s, std::numeric_limits<double>::infinity())};
  for (int64_t g = -1; g < args.update.adapters(); ++g) {
    const at::Tensor rows = rows_of(args.update, g);
    if (rows.numel() == 0) continue;
    const Update own = g < 0 ? no_update(args.update) : update_of(args.update, g);
    const Update own_exact = g < 0 ? no_update(exact.update) : update_of(exact.update, g);
    const Forward part =
        allowed({args.x.index_select(0, rows), base_of(args.base, rows), own},
                ForwardArgs{exact.x.index_select(0, rows), base_of(exact.base, rows), own_exact},
                {expected.y.index_select(0, rows), expected.s}, hybrid);
    out.y.index_copy_(0, rows, part.y);
    if (g >= 0) out.s.narrow(1, 0, own.rank()).index_copy_(0, rows, part.s);
  }
  return out;
}

Backward allowed_grouped(const BackwardArgs& args, const BackwardArgs& exact,
                         const Backward& expected, bool hybrid) {
  Backward out{at::zeros_like(expected.dx), {}, {}};
  for (int64_t g = -1; g < args.update.adapters(); ++g) {
    const at::Tensor rows = rows_of(args.update, g);
    const Update own = g < 0 ? no_update(args.update) : update_of(args.update, g);
    const Update own_exact = g < 0 ? no_update(exact.update) : update_of(exact.update, g);
    const auto of = [&](const BackwardArgs& like, const Update& update, const auto& from) {
      BackwardArgs part = like;
      part.grad = from.grad.index_select(0, rows), part.x = from.x.index_select(0, rows);
      part.base = from.base, part.update = update;
      part.s = from.s.index_select(0, rows).narrow(1, 0, update.rank());
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

}  // namespace lora_ext::kernel_bounds
