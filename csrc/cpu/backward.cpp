// Backward: the passes over the segments (the rows of one adapter each), over threads.
//
//     dX = dY W (base)     for each piece of rows: dS = shrink(dY, B_g)
//                          for each piece of columns: dB_g = wgrad(dY, S), and
//                          dA_g = wgrad(X, w dS) with dX += mask * (dS A_g)
//
// dX += may be part of the base's pass, as Y += is; with few rows of one adapter, whose factor is not
// packed, it is a pass of its own. A piece of columns is a separate problem, with every pointer moved
// to its first column.
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>

#include "cpu/passes.h"

namespace lora_ext::cpu {
namespace {

// The gradients of lora_a or of lora_b: a list of tensors, or one tensor for a pool.
class Gradient {
 public:
  Gradient(const Update& update, at::TensorList factors, const NeedsGrad& wanted,
           const Factors* given, int64_t rank_dim, const Groups& groups)
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
      each[i] =
          given == nullptr ? at::empty(factors[i].sizes(), factors[i].options()) : (*given)[i];
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
                     const void* t, float scale) {
  const Groups::Rows rows = groups.rows_of(*piece.segment, {0, piece.segment->count});
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
  BackwardPass(const BackwardArgs& args, const Experts* experts)
      : args_(args),
        experts_(experts),
        groups_(args, experts),
        da_(args.update, args.update.lora_a, args.wanted.dlora_a,
            experts == nullptr ? nullptr : &experts->da, 0, groups_),
        db_(args.update, args.update.lora_b, args.wanted.dlora_b,
            experts == nullptr ? nullptr : &experts->db, 1, groups_),
        weights_(experts == nullptr || !experts->weights
                     ? nullptr
                     : experts->weights->const_data_ptr<float>()),
        expands_(args.wanted.dx && !groups_.panel()) {}

  Backward run() {
    if (expands_) dx_ = backward_of_base(args_.grad, args_.x, args_.base, experts_);
    ds_ = at::empty({args_.x.size(0), args_.update.rank()}, at::kFloat);
    weighted_ds_ = weights_ != nullptr ? at::empty(ds_.sizes(), at::kFloat) : ds_;
    const bool makes_t = makes_own_t(groups_, experts_, args_.x.size(1), false);
    if (!makes_t) make_ds();
    if (groups_.panel()) make_dx(*groups_.panel(), makes_t);
    if (makes_t && weights_ != nullptr) weigh_all();
    make_columns();
    return {dx_, da_.each, db_.each};
  }

 private:
  // dX in one pass.
  void make_dx(Dtype panel, bool makes_t) {
    const std::vector<int32_t> order = groups_.order_of_all(args_.grad.size(0));
    LowRank low_rank = low_rank_of(groups_, order, ds_, false);
    low_rank.makes_t = makes_t;
    if (groups_.dropout().enabled() && tile_walk(panel) != nullptr) {
      // For dX, and for dA where its kernels read it (AMX), in whole blocks of 64 columns.
      kept_ = drawn_mask(groups_.dropout(), low_rank.rows, args_.grad.size(0), args_.x.size(1));
      low_rank.mask = bits_of(kept_);
      is_sorted_ = !order.empty();
    }
    dx_ = fused_product(args_.grad, args_.base, experts_, panel, low_rank, false);
  }

  bool needs_ds(const Segment& segment) const { return args_.wanted.dx || da_.wants(segment); }

  void make_ds() {
    RowPieces pieces;
    for (const RowPiece& piece : pieces_of_rows(groups_, args_.grad.size(1))) {
      if (needs_ds(*piece.segment)) pieces.push_back(piece);
    }
    if (pieces.empty()) return;
    const int64_t threads = threads_for(work_of(pieces));
    c10::SmallVector<Factor, 1> factors(static_cast<size_t>(threads));
    run_pieces(pieces, threads, [&](int64_t thread, const RowPiece& piece) {
      const Segment& segment = *piece.segment;
      Factor& b = factors[static_cast<size_t>(thread)];
      const SkinnyKernels& kernels = *groups_.passes(segment).over_y;
      b.for_shrink(segment, ranks_of(groups_.b(segment), piece), kernels, groups_.few_rows());
      float* t = Groups::dense_part(ds_, segment, piece.rows.begin) + piece.ranks.begin;
      b.shrink(shrink_args(args_.grad, groups_.rows_of(segment, piece.rows), b,
                           groups_.scaling(segment), t, Dropout{}),
               size_of(piece.rows));
      if (weights_ != nullptr) weigh(segment, piece.rows, t);
    });
  }

  void weigh_all() const {
    const RowPieces pieces = pieces_of_rows(groups_, 1);
    run_pieces(pieces, threads_for(work_of(pieces)), [&](int64_t, const RowPiece& piece) {
      weigh(*piece.segment, piece.rows, Groups::dense_part(ds_, *piece.segment, piece.rows.begin));
    });
  }

  void weigh(const Segment& segment, Range rows, const float* ds) const {
    float* to = Groups::dense_part(weighted_ds_, segment, rows.begin);
    const Groups::Rows where = groups_.rows_of(segment, rows);
    for (int64_t m = 0; m < size_of(rows); ++m) {
      const float weight = weights_[where.first + where.index[m]];
      for (int64_t j = m * segment.rank; j < (m + 1) * segment.rank; ++j) to[j] = weight * ds[j];
    }
  }

  void make_columns() {
    ColumnPieces pieces;
    int64_t work = 0;
    const auto for_products = [&](const auto& visit) {
      for (const Segment& segment : groups_.segments()) {
        const int64_t per_column = work_of_column(segment);
        if (db_.wants(segment)) visit(segment, false, args_.grad.size(1), per_column);
        const int64_t products = (expands_ ? 1 : 0) + (da_.wants(segment) ? 1 : 0);
        if (products > 0) visit(segment, true, args_.x.size(1), products * per_column);
      }
    };
    for_products([&](const Segment&, bool, int64_t columns, int64_t per_column) {
      work += columns * per_column;
    });
    for_products([&](const Segment& segment, bool over_x, int64_t columns, int64_t per_column) {
      add_columns(pieces, groups_, segment, over_x, columns, per_column, work);
    });
    if (args_.wanted.any_b()) {
      wgrad_s_.emplace(groups_, groups_.dense_s(args_.s), &Passes::over_y, &SkinnyKernels::wgrad_t);
    }
    if (args_.wanted.any_a()) {
      wgrad_ds_.emplace(groups_, weighted_ds_, &Passes::over_x, &SkinnyKernels::wgrad_t);
    }
    if (expands_) {
      const bool is_half = args_.update.lora_a[0].scalar_type() == at::kBFloat16;
      expand_ds_.emplace(groups_, ds_, &Passes::over_x, &SkinnyKernels::expand_t, is_half);
    }
    const int64_t threads = threads_for(work);
    c10::SmallVector<Thread, 1> state(static_cast<size_t>(threads));
    run_pieces(pieces, threads, [&](int64_t thread, const ColumnPiece& piece) {
      Thread& own = state[static_cast<size_t>(thread)];
      piece.over_x ? over_x(piece, own.a, own.s) : over_y(piece, own.s);
    });
  }

  // dB_g
  void over_y(const ColumnPiece& piece, Scratch& sums) {
    const Segment& segment = *piece.segment;
    const SkinnyKernels& kernels = *groups_.passes(segment).over_y;
    WgradArgs args = wgrad_args(groups_, piece, args_.grad, wgrad_s_->of(groups_, segment),
                                groups_.scaling(segment));
    db_.to(args, segment, piece.columns.begin);
    args.work = sums.of(kernels.wgrad_bytes(args.rank));
    kernels.wgrad(args, ExpandArgs{}, {0, size_of(piece.columns)});
  }

  // dA_g, and dX += mask * (dS A_g)
  void over_x(const ColumnPiece& piece, Factor& a, Scratch& sums) {
    const Segment& segment = *piece.segment;
    const SkinnyKernels& kernels = *groups_.passes(segment).over_x;
    const bool makes_da = da_.wants(segment);
    ExpandArgs expand{};
    if (expands_) {
      const Groups::Rows rows = groups_.rows_of(segment, {0, segment.count});
      expand = expand_args(dx_, groups_, piece, a, groups_.a(segment), kernels,
                           groups_.keep_scale(), expand_ds_->of(groups_, segment),
                           groups_.dropout_at(rows, piece.columns.begin));
      if (!makes_da || groups_.is_one_of_few_rows()) {
        a.expand(expand, segment.count);
        expand = {};
      }
    }
    if (!makes_da) return;
    WgradArgs args =
        wgrad_args(groups_, piece, args_.x, wgrad_ds_->of(groups_, segment), groups_.keep_scale());
    da_.to(args, segment, piece.columns.begin);
    args.mask = bits_of(kept_).at(is_sorted_ ? segment.begin : groups_.first_row(segment),
                                  piece.columns.begin);
    args.work = sums.of(kernels.wgrad_bytes(args.rank));
    kernels.wgrad(args, expand, {0, size_of(piece.columns)});
  }

  const BackwardArgs& args_;
  const Experts* experts_;
  const Groups groups_;
  Gradient da_, db_;
  const float* weights_;              // of the rows, or null
  bool expands_;                      // whether dX += is a pass of its own
  at::Tensor dx_, ds_, weighted_ds_;  // weighted: by the rows' weights, if there are any
  at::Tensor kept_;                   // the mask of dX in the order of its product, or none
  bool is_sorted_ = false;            // whether that is the order of the segments
  std::optional<ColumnT> wgrad_s_, wgrad_ds_, expand_ds_;
};

}  // namespace

std::optional<Backward> backward(const BackwardArgs& args, const Experts* experts) {
  if (takes_library(args.x, args.grad.scalar_type(), args.update)) return std::nullopt;
  return BackwardPass(args, experts).run();
}

}  // namespace lora_ext::cpu
