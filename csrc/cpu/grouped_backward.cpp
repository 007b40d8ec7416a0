// Many adapters, backward: the passes over the segments (the rows of one adapter each), over threads.
//
//     dX = dY W (base)     for each piece of rows: dS = shrink(dY, B_g)
//                          for each piece of columns: dB_g = wgrad(dY, S), and
//                          dA_g = wgrad(X, w dS) with dX += mask * (dS A_g)
//
// dX += may be part of the base's pass, as Y += is. A piece of columns is a separate problem, with
// every pointer moved to its first column.
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>

#include "cpu/grouped.h"

namespace lora_ext::cpu {
namespace {

// The gradients of lora_a or of lora_b: a list of tensors, or one tensor for a pool.
class Gradient {
 public:
  Gradient(const Update& update, at::TensorList factors, const NeedsGrad& wanted,
           const Factors& given, int64_t rank_dim, const Groups& groups)
      : pool_(update.is_pool()), rank_dim_(rank_dim), each(factors.size()) {
    // Whether all of it will be written.
    std::vector<bool> is_whole(factors.size(), false);
    const auto segments = static_cast<int64_t>(groups.segments().size());
    if (pool_) is_whole[0] = segments == update.adapters() && !update.grouping->ranks;
    for (const Segment& segment : groups.segments()) {
      if (!pool_) is_whole[segment.adapter] = true;
    }
    for (size_t i = 0; i < factors.size(); ++i) {
      if (!wanted[i]) continue;
      each[i] = given.empty() ? at::empty(factors[i].sizes(), factors[i].options()) : given[i];
      if (!is_whole[i]) each[i].zero_();
    }
  }

  bool wants(const Segment& segment) const { return of(segment).defined(); }

  // Sets wgrad's result G to the gradient of a segment's adapter, from `column` on.
  void to(WgradArgs& args, const Segment& segment, int64_t column) const {
    const at::Tensor& g = of(segment);
    const int64_t dim = pool_ ? rank_dim_ + 1 : rank_dim_;
    args.g_rank_pitch = g.stride(dim);
    args.g_col_pitch = g.stride(pool_ ? 2 - rank_dim_ : 1 - rank_dim_);
    args.g_dtype = dtype_of(g.scalar_type());
    const int64_t element = (pool_ ? segment.adapter * g.stride(0) : 0) + column * args.g_col_pitch;
    args.g = static_cast<char*>(g.mutable_data_ptr()) + element * g.element_size();
  }

 private:
  const at::Tensor& of(const Segment& segment) const {
    return each[pool_ ? 0 : static_cast<size_t>(segment.adapter)];
  }

  bool pool_;
  int64_t rank_dim_;

 public:
  Factors each;
};

WgradArgs wgrad_args(const Groups& groups, const ColumnPiece& piece, const at::Tensor& p,
                     const Groups::Rows& rows, const void* t, float scale) {
  WgradArgs args{};
  args.p = const_at_element(p, rows.first, piece.columns.begin);
  args.dtype = dtype_of(p.scalar_type()), args.p_pitch = p.stride(0);
  args.rows = piece.segment->count, args.rank = piece.segment->rank;
  args.t = t, args.scale = scale, args.row_index = rows.index;
  if (piece.over_x) args.dropout = groups.dropout_at(rows, piece.columns.begin);
  return args;
}

class BackwardPass {
 public:
  BackwardPass(const BackwardArgs& args, const Groups& groups)
      : args_(args),
        groups_(groups),
        da_(args.update, args.update.lora_a, args.wanted.dlora_a, args.wanted.to_a, 0, groups),
        db_(args.update, args.update.lora_b, args.wanted.dlora_b, args.wanted.to_b, 1, groups) {}

  Backward run() {
    const std::optional<Dtype> panel =
        args_.wanted.dx ? panel_of(groups_, args_.grad, args_.base, false) : std::nullopt;
    expands_ = args_.wanted.dx && !panel;
    if (expands_) dx_ = backward_of_base(args_.grad, args_.x, args_.base);
    make_ds();
    if (panel) make_dx(*panel);
    make_columns();
    return {dx_, da_.each, db_.each};
  }

 private:
  bool needs_columns_of_x(const Segment& segment) const { return expands_ || da_.wants(segment); }

  // dX in one pass.
  void make_dx(Dtype panel) {
    const std::vector<int32_t> order = groups_.order_of_all(args_.grad.size(0));
    LowRank low_rank = low_rank_of(
        groups_, order, ds_, [&](const Segment& segment) { return groups_.a(segment); },
        [&](const Segment&) { return groups_.keep_scale(); });
    low_rank.dropout = groups_.dropout();
    dx_ = fused_backward(args_.grad, args_.base, panel, low_rank);
  }

  bool needs_ds(const Segment& segment) const { return args_.wanted.dx || da_.wants(segment); }

  void make_ds() {
    std::vector<RowPiece> pieces;
    for (const RowPiece& piece : pieces_of_rows(groups_, args_.grad.size(1))) {
      if (needs_ds(*piece.segment)) pieces.push_back(piece);
    }
    if (pieces.empty()) return;
    ds_ = at::empty({args_.x.size(0), args_.update.rank()}, at::kFloat);
    weighted_ds_ = args_.weights ? at::empty(ds_.sizes(), at::kFloat) : ds_;
    const int64_t threads = threads_for(work_of(pieces));
    std::vector<Thread> state(static_cast<size_t>(threads));
    run_pieces(pieces, threads, [&](int64_t thread, const RowPiece& piece) {
      const Segment& segment = *piece.segment;
      Factor& b = state[static_cast<size_t>(thread)].b;
      const SkinnyKernels& kernels = *groups_.passes(segment).over_y;
      b.for_shrink(segment, groups_.b(segment), kernels, groups_.few_rows(kernels));
      float* t = Groups::dense_part(ds_, segment, piece.rows.begin);
      b.shrink(shrink_args(args_.grad, groups_.rows_of(segment, piece.rows), b,
                           groups_.scaling(segment), t, Dropout{}),
               size_of(piece.rows));
      if (args_.weights) weigh(segment, piece.rows, t);
    });
  }

  void weigh(const Segment& segment, Range rows, const float* ds) const {
    const float* weights = args_.weights->const_data_ptr<float>();
    float* to = Groups::dense_part(weighted_ds_, segment, rows.begin);
    const Groups::Rows where = groups_.rows_of(segment, rows);
    for (int64_t m = 0; m < size_of(rows); ++m) {
      const float weight = weights[where.first + where.index[m]];
      for (int64_t j = m * segment.rank; j < (m + 1) * segment.rank; ++j) to[j] = weight * ds[j];
    }
  }

  void make_columns() {
    std::vector<ColumnPiece> pieces;
    int64_t work = 0;
    for (const Segment& segment : groups_.segments()) {
      const int64_t columns = (db_.wants(segment) ? args_.grad.size(1) : 0) +
                              (needs_columns_of_x(segment) ? args_.x.size(1) : 0);
      work += work_of_column(segment) * columns;
    }
    for (const Segment& segment : groups_.segments()) {
      if (db_.wants(segment)) add_columns(pieces, segment, false, args_.grad.size(1), work);
      if (needs_columns_of_x(segment)) add_columns(pieces, segment, true, args_.x.size(1), work);
    }
    const int64_t threads = threads_for(work);
    std::vector<Thread> state(static_cast<size_t>(threads));
    run_pieces(pieces, threads, [&](int64_t thread, const ColumnPiece& piece) {
      Thread& own = state[static_cast<size_t>(thread)];
      piece.over_x ? over_x(piece, own) : over_y(piece, own);
    });
  }

  // S of a segment in wgrad's layout; if it must be gathered, each piece of columns does so itself.
  const float* s_of(const Segment& segment, Thread& own) const {
    const Range rows{0, segment.count};
    if (const float* in_place = groups_.s_in_place(args_.s, segment, rows)) return in_place;
    auto* s = static_cast<float*>(own.s.of(segment.count * segment.rank * sizeof(float)));
    groups_.gather_s(args_.s, segment, rows, s);
    return s;
  }

  // dB_g
  void over_y(const ColumnPiece& piece, Thread& own) {
    const Segment& segment = *piece.segment;
    const SkinnyKernels& kernels = *groups_.passes(segment).over_y;
    const Groups::Rows rows = groups_.rows_of(segment, {0, segment.count});
    const void* t =
        packed_t(kernels.wgrad_t, s_of(segment, own), segment.count, segment.rank, false, own.t);
    WgradArgs args = wgrad_args(groups_, piece, args_.grad, rows, t, groups_.scaling(segment));
    db_.to(args, segment, piece.columns.begin);
    kernels.wgrad(args, ExpandArgs{}, {0, size_of(piece.columns)});
  }

  // dA_g, and dX += mask * (dS A_g)
  void over_x(const ColumnPiece& piece, Thread& own) {
    const Segment& segment = *piece.segment;
    const SkinnyKernels& kernels = *groups_.passes(segment).over_x;
    const Groups::Rows rows = groups_.rows_of(segment, {0, segment.count});
    const float* ds = Groups::dense_part(ds_, segment, 0);
    ExpandArgs expand{};
    if (expands_) {
      const Dropout dropout = groups_.dropout_at(rows, piece.columns.begin);
      own.a.for_columns(part_of(groups_.a(segment), {0, segment.rank}, piece.columns), kernels);
      const void* packed = packed_t(kernels.expand_t, ds, segment.count, segment.rank,
                                    own.a.is_half(), own.expand_t);
      expand =
          expand_args(dx_, rows, piece.columns.begin, own.a, groups_.keep_scale(), packed, dropout);
    }
    if (!da_.wants(segment)) return own.a.expand(expand, segment.count);
    const void* t = packed_t(kernels.wgrad_t, Groups::dense_part(weighted_ds_, segment, 0),
                             segment.count, segment.rank, false, own.t);
    WgradArgs args = wgrad_args(groups_, piece, args_.x, rows, t, groups_.keep_scale());
    da_.to(args, segment, piece.columns.begin);
    kernels.wgrad(args, expand, {0, size_of(piece.columns)});
  }

  const BackwardArgs& args_;
  const Groups& groups_;
  Gradient da_, db_;
  at::Tensor dx_, ds_, weighted_ds_;  // weighted: by the rows' weights, if there are any
  bool expands_ = false;              // whether dX += is a pass of its own
};

}  // namespace

std::optional<Backward> backward_grouped(const BackwardArgs& args) {
  if (!has_passes(args.x.scalar_type(), args.grad.scalar_type())) {
    return std::nullopt;
  }
  const Groups groups(args.update, segments_of(args.base.op(), args.update, args.x.size(0)),
                      args.x.scalar_type(), args.grad.scalar_type(), args.base.row_block > 0);
  return BackwardPass(args, groups).run();
}

}  // namespace lora_ext::cpu
