// S is split over rows, or with one row over ranks; Y is split over columns. No sum is split, so
// results do not depend on the number of threads.
#include <ATen/ops/empty.h>

#include "cpu/dispatch.h"
#include "cpu/driver.h"
#include "cpu/operands.h"
#include "cpu/work_split.h"

namespace lora_ext::cpu {
namespace {

constexpr int64_t kRankGranule = 16, kColumnGranule = 128;
// Reading a factor takes as long as the products of this number of rows.
constexpr int64_t kReadRows = 3;

// Calls run(range) over [0, size) in granules, on as many threads as the work is worth.
template <class Run>
void in_granules(int64_t size, int64_t granule, int64_t work, const Run& run) {
  const int64_t granules = (size + granule - 1) / granule;
  const int64_t threads = std::min(threads_for(work), granules);
  at::parallel_for(0, threads, 1, [&](int64_t first, int64_t last) {
    const int64_t begin = first * granules / threads * granule;
    const int64_t end = last * granules / threads * granule;
    run(Range{begin, std::min(end, size)});
  });
}

// scale * drop(p) Q for the adapter view Q: S and dS, [rows, rank] in float.
at::Tensor shrink_of_few(const SkinnyKernels& kernels, const at::Tensor& p, const AdapterView& q,
                         double scale, const Dropout& dropout) {
  const int64_t rows = p.size(0), work = (rows + kReadRows) * q.rank * q.cols;
  at::Tensor t = at::empty({rows, q.rank}, p.options().dtype(at::kFloat));
  const ShrinkArgs args = shrink_args(p, q, nullptr, scale, t.mutable_data_ptr<float>(), dropout);
  if (rows > 1) {
    in_granules(rows, 1, work, [&](Range range) { kernels.shrink_few(args, q, range); });
    return t;
  }
  in_granules(q.rank, kRankGranule, work, [&](Range ranks) {
    ShrinkArgs own = args;
    own.rank = ranks.end - ranks.begin, own.t += ranks.begin;
    kernels.shrink_few(own, part_of(q, ranks, {0, q.cols}), {0, 1});
  });
  return t;
}

// y += scale * mask * (t U) for the adapter view U.
void expand_few(const SkinnyKernels& kernels, const at::Tensor& y, const at::Tensor& t,
                const AdapterView& u, double scale, const Dropout& dropout) {
  const int64_t rows = y.size(0), work = (rows + kReadRows) * u.rank * u.cols;
  in_granules(u.cols, kColumnGranule, work, [&](Range columns) {
    const AdapterView part = part_of(u, {0, u.rank}, columns);
    ExpandArgs args = expand_args(y, part, nullptr, scale, t.const_data_ptr<float>(), dropout);
    args.y = static_cast<char*>(args.y) + columns.begin * y.element_size();
    args.dropout.col_offset += columns.begin;
    kernels.expand_few(args, part, {0, rows});
  });
}

// scale * t^T drop(p), with the sizes and dtype of `factor`; rank_dim is its dimension of the rank.
at::Tensor wgrad_of_few(const SkinnyKernels& kernels, const at::Tensor& p, const at::Tensor& t,
                        const at::Tensor& factor, int64_t rank_dim, double scale,
                        const Dropout& dropout) {
  at::Tensor g = at::empty(factor.sizes(), factor.options());
  const WgradArgs args = wgrad_args(p, t.const_data_ptr(), g, rank_dim, scale, dropout);
  // It reads little and writes a whole factor.
  const int64_t work = (p.size(0) + kReadRows) * t.size(1) * p.size(1);
  in_granules(p.size(1), kernels.col_granule, work,
              [&](Range columns) { kernels.wgrad(args, ExpandArgs{}, columns); });
  return g;
}

}  // namespace

bool strides_suit_few_rows(const Update& update) {
  const AdapterView a = view_of(update.a(), 0), b = view_of(update.b(), 1);
  return (a.col_pitch == 1 || a.rank_pitch == 1) && b.rank_pitch == 1;
}

// Vector code also for bfloat16: an AMX tile has 32 rows.
Forward forward_few_rows(const ForwardArgs& args) {
  const SkinnyKernels& kernels = *kernels_for_few_rows();
  const Update& update = args.update;
  const at::Tensor y = forward_of_base(args.x, args.base);
  const at::Tensor s = shrink_of_few(kernels, args.x, view_of(update.a(), 0),
                                     keep_scale_of(update.dropout), dropout_of(update.dropout));
  expand_few(kernels, y, s, view_of(update.b(), 1), update.scaling, Dropout{});
  return {y, s};
}

Backward backward_few_rows(const BackwardArgs& args) {
  const SkinnyKernels& kernels = *kernels_for_few_rows();
  const Update& update = args.update;
  const double keep_scale = keep_scale_of(update.dropout);
  const Dropout dropout = dropout_of(update.dropout);
  Backward out = Backward::one();
  if (args.need_dlora_b()) {
    out.db() = wgrad_of_few(kernels, args.grad, args.s, update.b(), 1, update.scaling, Dropout{});
  }
  if (!args.wanted.dx && !args.need_dlora_a()) return out;
  const at::Tensor ds =
      shrink_of_few(kernels, args.grad, view_of(update.b(), 1), update.scaling, Dropout{});
  if (args.wanted.dx) {
    out.dx = backward_of_base(args.grad, args.x, args.base);
    expand_few(kernels, out.dx, ds, view_of(update.a(), 0), keep_scale, dropout);
  }
  if (args.need_dlora_a()) {
    out.da() = wgrad_of_few(kernels, args.x, ds, update.a(), 0, keep_scale, dropout);
  }
  return out;
}

}  // namespace lora_ext::cpu
