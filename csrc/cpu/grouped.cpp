// Distributes the skinny passes over segments (the rows of one adapter each) and over threads:
//
//     forward   Y = X W^T + bias (library)   for each piece of rows: S = shrink(X, A_g),
//                                            Y += s_g S B_g^T
//     backward  dX = dY W (library)          for each piece of rows: dS = shrink(dY, B_g)
//                                            for each piece of columns: dB_g = wgrad(dY, S), and
//                                            dA_g = wgrad(X, dS) with dX += mask * (dS A_g)
//
// A thread packs an adapter's factors once for consecutive pieces, into its own memory: packed
// factors of all adapters never exist at a time. A piece of columns is a separate problem, with
// every pointer moved to its first column.
#include <ATen/ops/zeros.h>

#include "cpu/dispatch.h"
#include "cpu/driver.h"
#include "cpu/groups.h"
#include "cpu/operands.h"
#include "cpu/work_split.h"

namespace lora_ext::cpu {
namespace {

int64_t count_of(const Range& range) { return range.end - range.begin; }

template <class Piece>
int64_t work_of(const std::vector<Piece>& pieces) {
  int64_t work = 0;
  for (const Piece& piece : pieces) work += piece.work;
  return work;
}

// What a thread keeps for the next piece.
struct Thread {
  Factor a, b;
  Scratch s, t, expand_t;
};

const char* const_at_element(const at::Tensor& tensor, int64_t row, int64_t column) {
  return static_cast<const char*>(tensor.const_data_ptr()) +
         (row * tensor.stride(0) + column) * tensor.element_size();
}

char* at_element(const at::Tensor& tensor, int64_t row, int64_t column) {
  return static_cast<char*>(tensor.mutable_data_ptr()) +
         (row * tensor.stride(0) + column) * tensor.element_size();
}

// T = scale * drop(P) Q for rows of P.
ShrinkArgs shrink_args(const at::Tensor& p, const Groups::Rows& rows, const Factor& q, float scale,
                       float* t, const Dropout& dropout) {
  ShrinkArgs args = shrink_args(p, q.view(), q.panel(), scale, t, dropout, rows.index);
  args.p = const_at_element(p, rows.first, 0);
  return args;
}

// Y += scale * mask * (T U) for rows of Y, from `column` on.
ExpandArgs expand_args(const at::Tensor& y, const Groups::Rows& rows, int64_t column,
                       const Factor& u, float scale, const void* t, const Dropout& dropout) {
  ExpandArgs args = expand_args(y, u.view(), u.panel(), scale, t, dropout, rows.index);
  args.y = at_element(y, rows.first, column);
  return args;
}

// Whether the vector kernels can compute the call: they do not support float64, nor float16 factors
// if x and y have different half types.
bool has_passes(at::ScalarType x, at::ScalarType y) {
  const bool two_halves = is_half(y) && is_half(x) && x != y;
  return x != at::kDouble && y != at::kDouble && !two_halves && kernels_for(dtype_of(x)) != nullptr;
}

// The gradients of lora_a or of lora_b: a list of tensors, or one tensor for a pool.
class Gradient {
 public:
  Gradient(const Update& update, at::TensorList factors, const NeedsGrad& wanted, int64_t rank_dim,
           const Groups& groups)
      : pool_(update.is_pool()), rank_dim_(rank_dim), each(factors.size()) {
    std::vector<bool> is_written(factors.size(), false);
    if (!pool_) {
      for (const Segment& segment : groups.segments()) is_written[segment.adapter] = true;
    }
    for (size_t i = 0; i < factors.size(); ++i) {
      if (!wanted[i]) continue;
      each[i] = is_written[i] ? at::empty(factors[i].sizes(), factors[i].options())
                              : at::zeros(factors[i].sizes(), factors[i].options());
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
        da_(args.update, args.update.lora_a, args.wanted.dlora_a, 0, groups),
        db_(args.update, args.update.lora_b, args.wanted.dlora_b, 1, groups) {}

  Backward run() {
    if (args_.wanted.dx) dx_ = backward_of_base(args_.grad, args_.x, args_.base);
    make_ds();
    make_columns();
    return {dx_, da_.each, db_.each};
  }

 private:
  bool needs_ds(const Segment& segment) const { return args_.wanted.dx || da_.wants(segment); }

  void make_ds() {
    std::vector<RowPiece> pieces;
    for (const RowPiece& piece : pieces_of_rows(groups_, args_.grad.size(1))) {
      if (needs_ds(*piece.segment)) pieces.push_back(piece);
    }
    if (pieces.empty()) return;
    ds_ = at::empty({args_.x.size(0), args_.update.rank()}, at::kFloat);
    const int64_t threads = threads_for(work_of(pieces));
    std::vector<Thread> state(static_cast<size_t>(threads));
    run_pieces(pieces, threads, [&](int64_t thread, const RowPiece& piece) {
      const Segment& segment = *piece.segment;
      Factor& b = state[static_cast<size_t>(thread)].b;
      const SkinnyKernels& kernels = *groups_.passes(segment).over_y;
      b.for_shrink(segment, groups_.b(segment), kernels, groups_.few_rows(kernels));
      float* t = Groups::ds_of(ds_, segment, piece.rows.begin);
      b.shrink(shrink_args(args_.grad, groups_.rows_of(segment, piece.rows), b,
                           groups_.scaling(segment), t, Dropout{}),
               count_of(piece.rows));
    });
  }

  void make_columns() {
    std::vector<ColumnPiece> pieces;
    int64_t work = 0;
    for (const Segment& segment : groups_.segments()) {
      const int64_t columns =
          (db_.wants(segment) ? args_.grad.size(1) : 0) + (needs_ds(segment) ? args_.x.size(1) : 0);
      work += work_of_column(segment) * columns;
    }
    for (const Segment& segment : groups_.segments()) {
      if (db_.wants(segment)) add_columns(pieces, segment, false, args_.grad.size(1), work);
      if (needs_ds(segment)) add_columns(pieces, segment, true, args_.x.size(1), work);
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
    kernels.wgrad(args, ExpandArgs{}, {0, count_of(piece.columns)});
  }

  // dA_g, and dX += mask * (dS A_g)
  void over_x(const ColumnPiece& piece, Thread& own) {
    const Segment& segment = *piece.segment;
    const SkinnyKernels& kernels = *groups_.passes(segment).over_x;
    const Groups::Rows rows = groups_.rows_of(segment, {0, segment.count});
    const float* ds = Groups::ds_of(ds_, segment, 0);
    ExpandArgs expand{};
    if (args_.wanted.dx) {
      const Dropout dropout = groups_.dropout_at(rows, piece.columns.begin);
      own.a.for_columns(part_of(groups_.a(segment), {0, segment.rank}, piece.columns), kernels);
      const void* packed = packed_t(kernels.expand_t, ds, segment.count, segment.rank,
                                    own.a.is_half(), own.expand_t);
      expand =
          expand_args(dx_, rows, piece.columns.begin, own.a, groups_.keep_scale(), packed, dropout);
    }
    if (!da_.wants(segment)) return own.a.expand(expand, segment.count);
    const void* t = packed_t(kernels.wgrad_t, ds, segment.count, segment.rank, false, own.t);
    WgradArgs args = wgrad_args(groups_, piece, args_.x, rows, t, groups_.keep_scale());
    da_.to(args, segment, piece.columns.begin);
    kernels.wgrad(args, expand, {0, count_of(piece.columns)});
  }

  const BackwardArgs& args_;
  const Groups& groups_;
  Gradient da_, db_;
  at::Tensor dx_, ds_;
};

}  // namespace

std::optional<Forward> forward_grouped(const ForwardArgs& args) {
  if (!has_passes(args.x.scalar_type(), args.y_dtype())) return std::nullopt;
  const int64_t rows = args.x.size(0);
  const Groups groups(args.update, segments_of(args.base.op(), args.update, rows),
                      args.x.scalar_type(), args.y_dtype(), args.base.row_block > 0);
  const at::Tensor y = forward_of_base(args.x, args.base);
  const at::Tensor s = at::empty({rows, args.update.rank()}, at::kFloat);
  const std::vector<RowPiece> pieces = pieces_of_rows(groups, args.x.size(1) + y.size(1));
  const int64_t threads = threads_for(work_of(pieces));
  std::vector<Thread> state(static_cast<size_t>(threads));
  run_pieces(pieces, threads, [&](int64_t thread, const RowPiece& piece) {
    const Segment& segment = *piece.segment;
    const Passes passes = groups.passes(segment);
    const Groups::Rows where = groups.rows_of(segment, piece.rows);
    const int64_t count = count_of(piece.rows);
    Thread& own = state[static_cast<size_t>(thread)];
    float* in_place = groups.s_in_place(s, segment, piece.rows);
    float* t = in_place;
    if (t == nullptr) t = static_cast<float*>(own.s.of(count * segment.rank * sizeof(float)));
    own.a.for_shrink(segment, groups.a(segment), *passes.over_x, groups.few_rows(*passes.over_x));
    own.a.shrink(
        shrink_args(args.x, where, own.a, groups.keep_scale(), t, groups.dropout_at(where, 0)),
        count);
    own.b.for_expand(segment, groups.b(segment), *passes.over_y, groups.few_rows(*passes.over_y));
    const void* packed =
        packed_t(passes.over_y->expand_t, t, count, segment.rank, own.b.is_half(), own.t);
    own.b.expand(expand_args(y, where, 0, own.b, groups.scaling(segment), packed, Dropout{}),
                 count);
    if (in_place == nullptr) groups.scatter_s(s, segment, piece.rows, t);
  });
  return Forward{y, s};
}

std::optional<Backward> backward_grouped(const BackwardArgs& args) {
  if (!has_passes(args.x.scalar_type(), args.grad.scalar_type())) {
    return std::nullopt;
  }
  const Groups groups(args.update, segments_of(args.base.op(), args.update, args.x.size(0)),
                      args.x.scalar_type(), args.grad.scalar_type(), args.base.row_block > 0);
  return BackwardPass(args, groups).run();
}

}  // namespace lora_ext::cpu
