// Spreads the skinny passes over threads around the base GEMM:
//
//     forward   Y = X W^T + bias (library)    S = shrink(X, A)     Y += s S B^T
//     backward  dX = dY W (library)           dS = shrink(dY, B)   dB = wgrad(dY, S)
//               dA = wgrad(X, dS) and dX += mask * (dS A) in one pass with one mask
//
// Workspaces are the adapters packed in the kernels' layout, from torch's allocator.
#include "cpu/driver.h"

#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>

#include "common/base_linear.h"
#include "cpu/brgemm.h"
#include "cpu/dispatch.h"
#include "cpu/fused_product.h"
#include "cpu/operands.h"
#include "cpu/work_split.h"

namespace lora_ext::cpu {
namespace {

// Packing the adapters costs rank * (K + N), independent of the rows. Up to these numbers of rows
// it costs more than the passes save, so the factors are read in their original layout. Measured at
// K = N = 1024 and 4096 with 1 and 16 rows, ranks 16 and 64.
constexpr int64_t kFewForwardRows = 16;
constexpr int64_t kFewBackwardRows = 7;
constexpr int64_t kFewRowsOfHighRank = 32;
constexpr int64_t kHighRank = 32;

template <class Bytes, class Pack>
at::Tensor packed(const AdapterView& view, Bytes bytes, Pack pack) {
  at::Tensor panel = at::empty({bytes(view.rank, view.cols)}, at::kByte);
  pack(view, panel.mutable_data_ptr());
  return panel;
}

// Calls run(range) over [0, size) in granules; little work stays on one thread.
template <class Run>
void parallel_ranges(int64_t size, int64_t granule, int64_t work_per_item, const Run& run) {
  const int64_t granules = (size + granule - 1) / granule;
  const int64_t grain =
      std::max<int64_t>(1, min_work / std::max<int64_t>(1, granule * work_per_item));
  at::parallel_for(0, granules, grain, [&](int64_t begin, int64_t end) {
    run(Range{begin * granule, std::min(end * granule, size)});
  });
}

// scale * drop(p) Q for the adapter view Q: S and dS, [rows, rank] in float.
at::Tensor shrink(const SkinnyKernels& kernels, const at::Tensor& p, const AdapterView& adapter,
                  double scale, const Dropout& dropout) {
  const int64_t rows = p.size(0);
  at::Tensor t = at::empty({rows, adapter.rank}, p.options().dtype(at::kFloat));
  const at::Tensor panel = packed(adapter, kernels.shrink_panel_bytes, kernels.pack_shrink);
  const ShrinkArgs args =
      shrink_args(p, adapter, panel.const_data_ptr(), scale, t.mutable_data_ptr<float>(), dropout);
  parallel_ranges(rows, kernels.row_granule, adapter.cols * adapter.rank,
                  [&](Range range) { kernels.shrink(args, range); });
  return t;
}

// T in the layout that a pass reads: t itself, or packed by several threads.
at::Tensor packed_t(const TLayout& layout, const at::Tensor& t, bool u_is_half) {
  if (layout.bytes == nullptr) return t;
  const int64_t rows = t.size(0), rank = t.size(1);
  at::Tensor out = at::empty({layout.bytes(rows, rank, u_is_half)}, at::kByte);
  parallel_ranges(rows, layout.row_granule, 8 * rank, [&](Range range) {
    layout.pack(t.const_data_ptr<float>(), rank, u_is_half, range, out.mutable_data_ptr());
  });
  return out;
}

void expand(const SkinnyKernels& kernels, at::Tensor& y, const at::Tensor& t,
            const AdapterView& adapter, double scale, const Dropout& dropout) {
  const at::Tensor panel = packed(adapter, kernels.expand_panel_bytes, kernels.pack_expand);
  const at::Tensor rows_t = packed_t(kernels.expand_t, t, adapter.dtype == Dtype::kBFloat16);
  const ExpandArgs args =
      expand_args(y, adapter, panel.const_data_ptr(), scale, rows_t.const_data_ptr(), dropout);
  parallel_ranges(y.size(0), kernels.row_granule, adapter.cols * adapter.rank,
                  [&](Range range) { kernels.expand(args, range); });
}

// g(j, c) = scale * sum_m t[m, j] drop(p)[m, c], and, if given, the expand over the same columns.
void wgrad(const SkinnyKernels& kernels, const at::Tensor& p, const at::Tensor& t, at::Tensor& g,
           int64_t rank_dim, double scale, const Dropout& dropout, const ExpandArgs& expand) {
  const int64_t rank = t.size(1);
  const at::Tensor columns_t = packed_t(kernels.wgrad_t, t, false);
  const WgradArgs args = wgrad_args(p, columns_t.const_data_ptr(), g, rank_dim, scale, dropout);
  parallel_ranges(p.size(1), kernels.col_granule, p.size(0) * rank,
                  [&](Range range) { kernels.wgrad(args, expand, range); });
}

// Why the library computes a call, or "". Passes over bfloat16 cannot read float16 adapters, which
// occur with them only if x and y have different half types.
std::string reason_for_library(at::ScalarType x, at::ScalarType y, int64_t rank) {
  if (x == at::kDouble || y == at::kDouble) return "torch's products compute float64";
  if (kernels_for(dtype_of(x)) == nullptr) return "torch's products were asked for";
  if (rank > kMaxRank) return "rank above " + std::to_string(kMaxRank);
  return is_half(y) && is_half(x) && x != y ? "x and y of two 16-bit dtypes" : "";
}

// A batch-invariant call has the passes of many rows.
bool is_few(int64_t rows, int64_t most, const Base& base, const Update& update) {
  return base.row_block == 0 && rows <= (update.rank() > kHighRank ? kFewRowsOfHighRank : most) &&
         strides_suit_few_rows(update);
}

bool takes_library(const at::Tensor& x, at::ScalarType y, const Update& update) {
  return !reason_for_library(x.scalar_type(), y, update.rank()).empty();
}

Passes passes_of(const at::Tensor& x, at::ScalarType y) {
  return {kernels_for(dtype_of(x.scalar_type())), kernels_for(dtype_of(y))};
}

}  // namespace

std::string library_reason(at::ScalarType x, int64_t rank) {
  return reason_for_library(x, x, rank);
}

bool is_batch_invariant(at::ScalarType x, at::ScalarType y, const Update& update) {
  return reason_for_library(x, y, update.rank()).empty() &&
         std::max(update.in_features(), update.out_features()) <= kMaxPanelDepth &&
         batch_invariant_panel_dtype(dtype_of(x)).has_value();
}

std::optional<Forward> forward(const ForwardArgs& args) {
  if (!args.update.is_one()) return forward_grouped(args);
  if (takes_library(args.x, args.y_dtype(), args.update)) return std::nullopt;
  const std::optional<Dtype> fused = fused_panel(args.x, args.base, true);
  if (!fused && is_few(args.x.size(0), kFewForwardRows, args.base, args.update))
    return forward_few_rows(args);
  const Passes passes = passes_of(args.x, args.y_dtype());
  const AdapterView lora_b = view_of(args.update.b(), 1);
  const at::Tensor s = shrink(*passes.over_x, args.x, view_of(args.update.a(), 0),
                              keep_scale_of(args.update.dropout), dropout_of(args.update.dropout));
  if (fused) {
    const LowRank update = LowRank::one(s, lora_b, args.update.scaling);
    return Forward{fused_forward(args.x, args.base, *fused, update), s};
  }
  at::Tensor y = base_forward(args.x, args.base);
  expand(*passes.over_y, y, s, lora_b, args.update.scaling, Dropout{});
  return Forward{y, s};
}

std::optional<Backward> backward(const BackwardArgs& args) {
  if (!args.update.is_one()) return backward_grouped(args);
  const at::ScalarType y = args.grad.scalar_type();
  if (takes_library(args.x, y, args.update)) return std::nullopt;
  const std::optional<Dtype> fused =
      args.wanted.dx ? fused_panel(args.grad, args.base, false) : std::nullopt;
  if (!fused && is_few(args.x.size(0), kFewBackwardRows, args.base, args.update)) {
    return backward_few_rows(args);
  }
  const Passes passes = passes_of(args.x, y);
  Backward out = Backward::one();
  const ExpandArgs no_expand{};
  if (args.wanted.dx && !fused) out.dx = base_backward(args.grad, args.x, args.base);
  if (args.need_dlora_b()) {
    out.db() = at::empty(args.update.b().sizes(), args.update.b().options());
    wgrad(*passes.over_y, args.grad, args.s, out.db(), 1, args.update.scaling, Dropout{},
          no_expand);
  }
  if (!args.wanted.dx && !args.need_dlora_a()) return out;

  const Dropout dropout = dropout_of(args.update.dropout);
  const double keep_scale = keep_scale_of(args.update.dropout);
  const AdapterView lora_a = view_of(args.update.a(), 0);
  const at::Tensor ds = shrink(*passes.over_y, args.grad, view_of(args.update.b(), 1),
                               args.update.scaling, Dropout{});
  if (fused) {
    const LowRank update = LowRank::one(ds, lora_a, keep_scale, dropout);
    out.dx = fused_backward(args.grad, args.base, *fused, update);
  } else if (!args.need_dlora_a()) {
    expand(*passes.over_x, out.dx, ds, lora_a, keep_scale, dropout);
  }
  if (!args.need_dlora_a()) return out;
  out.da() = at::empty(args.update.a().sizes(), args.update.a().options());
  if (!args.wanted.dx || fused) {
    wgrad(*passes.over_x, args.x, ds, out.da(), 0, keep_scale, dropout, no_expand);
    return out;
  }
  const at::Tensor panel =
      packed(lora_a, passes.over_x->expand_panel_bytes, passes.over_x->pack_expand);
  const at::Tensor rows_t = packed_t(passes.over_x->expand_t, ds, lora_a.dtype == Dtype::kBFloat16);
  wgrad(*passes.over_x, args.x, ds, out.da(), 0, keep_scale, dropout,
        expand_args(out.dx, lora_a, panel.const_data_ptr(), keep_scale, rows_t.const_data_ptr(),
                    dropout));
  return out;
}

}  // namespace lora_ext::cpu
