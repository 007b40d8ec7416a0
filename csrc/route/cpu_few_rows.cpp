// Work is split over rows, and of one row over the ranks of S; over the columns of Y. No sum is
// split, so that results do not depend on threads.
#include "route/cpu_few_rows.h"

#include <ATen/ops/empty.h>

#include "cpu/dispatch.h"
#include "library/base_linear.h"
#include "route/cpu_operands.h"
#include "route/work_split.h"

namespace lora_ext::cpu {
namespace {

constexpr int64_t kRankGranule = 16, kColumnGranule = 128;
// Reading a factor takes as long as the products of so many rows.
constexpr int64_t kReadRows = 3;

// Calls run(range) over [0, size) in granules, over as many threads as the work is worth.
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

at::Tensor shrink(const SkinnyKernels& kernels, const ForwardArgs& args) {
  const AdapterView a = view_of(args.update.lora_a, 0);
  const DropoutArgs& dropout = args.update.dropout;
  const int64_t rows = args.x.size(0), work = (rows + kReadRows) * a.rank * a.cols;
  at::Tensor s = at::empty({rows, a.rank}, args.x.options().dtype(at::kFloat));
  ShrinkArgs shrink{args.x.const_data_ptr(),
                    dtype_of(args.x.scalar_type()),
                    args.x.stride(0),
                    a.cols,
                    a.rank,
                    nullptr,
                    false,
                    static_cast<float>(dropout.enabled() ? dropout.keep_scale() : 1.0),
                    s.mutable_data_ptr<float>(),
                    dropout_of(dropout)};
  if (rows > 1) {
    in_granules(rows, 1, work, [&](Range range) { kernels.shrink_few(shrink, a, range); });
    return s;
  }
  in_granules(a.rank, kRankGranule, work, [&](Range ranks) {
    ShrinkArgs own = shrink;
    own.rank = ranks.end - ranks.begin, own.t += ranks.begin;
    kernels.shrink_few(own, part_of(a, ranks, {0, a.cols}), {0, 1});
  });
  return s;
}

void expand(const SkinnyKernels& kernels, const at::Tensor& y, const at::Tensor& s,
            const Update& update) {
  const AdapterView b = view_of(update.lora_b, 1);
  const int64_t rows = y.size(0), work = (rows + kReadRows) * b.rank * b.cols;
  in_granules(b.cols, kColumnGranule, work, [&](Range columns) {
    const int64_t cols = columns.end - columns.begin;
    const ExpandArgs args{
        static_cast<char*>(y.mutable_data_ptr()) + columns.begin * y.element_size(),
        dtype_of(y.scalar_type()),
        y.stride(0),
        cols,
        b.rank,
        nullptr,
        false,
        static_cast<float>(update.scaling),
        s.const_data_ptr<float>(),
        Dropout{}};
    kernels.expand_few(args, part_of(b, {0, b.rank}, columns), {0, rows});
  });
}

}  // namespace

bool lie_for_few_rows(const Update& update) {
  const AdapterView a = view_of(update.lora_a, 0), b = view_of(update.lora_b, 1);
  return (a.col_pitch == 1 || a.rank_pitch == 1) && b.rank_pitch == 1;
}

Forward forward_few_rows(const ForwardArgs& args) {
  // Vectors for bfloat16, too: an AMX tile has 32 rows.
  const SkinnyKernels& kernels = *kernels_for_few_rows();
  const at::Tensor y = base_forward(args.x, args.base);
  const at::Tensor s = shrink(kernels, args);
  expand(kernels, y, s, args.update);
  return {y, s};
}

}  // namespace lora_ext::cpu
