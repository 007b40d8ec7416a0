// Spreads the skinny passes over segments, the rows of one adapter each, and over threads:
//
//     forward   Y = X W^T + bias (library)   for each piece of rows: S = shrink(X, A_g),
//                                            Y += s_g S B_g^T
//     backward  dX = dY W (library)          for each piece of rows: dS = shrink(dY, B_g)
//                                            for each piece of columns: dB_g = wgrad(dY, S), and
//                                            dA_g = wgrad(X, dS) with dX += mask * (dS A_g)
//
// A thread packs an adapter's factors once for the pieces that follow one another, in memory of its
// own: nothing is kept for all adapters at a time. A piece of columns is a problem of its own, with
// every pointer moved to its first column.
#include "route/cpu_grouped_route.h"

#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>

#include "common/segments.h"
#include "cpu/dispatch.h"
#include "library/base_linear.h"
#include "library/grouped_library_route.h"
#include "route/cpu_operands.h"
#include "route/work_split.h"

namespace lora_ext::cpu {
namespace {

constexpr int64_t kPieceRows = 96;     // whole blocks of every instruction set's shrink
constexpr int64_t kColumnBlock = 128;  // of wgrad
constexpr int64_t kPackRows = 8;       // packing a factor takes as long as so many rows do
constexpr int64_t kFewRows = 16;       // of one adapter: vectors rather than tiles

// The vector code for the passes over x and dX, and over y and dY.
struct Passes {
  const SkinnyKernels *over_x, *over_y;
};

class Call {
 public:
  Call(const GroupedUpdate& update, Segments segments, at::ScalarType x, at::ScalarType y)
      : update_(update),
        segments_(std::move(segments)),
        scaling_(update.scaling.contiguous()),
        x_(dtype_of(x)),
        y_(dtype_of(y)),
        dropout_(dropout_of(update.dropout)),
        keep_scale_(dropout_.enabled() ? static_cast<float>(update.dropout.keep_scale()) : 1.f) {}

  const std::vector<Segment>& segments() const { return segments_.list; }
  int64_t rows() const { return static_cast<int64_t>(segments_.order.size()); }
  float scaling(const Segment& segment) const {
    return scaling_.const_data_ptr<float>()[segment.adapter];
  }
  float keep_scale() const { return keep_scale_; }
  Dtype x() const { return x_; }
  Dtype y() const { return y_; }

  Passes passes(const Segment& segment) const {
    if (segment.count >= kFewRows) return {kernels_for(x_), kernels_for(y_)};
    return {kernels_for_few_rows(), kernels_for_few_rows()};
  }

  AdapterView a(const Segment& segment) const { return view(update_.lora_a, 0, segment); }
  AdapterView b(const Segment& segment) const { return view(update_.lora_b, 1, segment); }

  // Some rows of a segment: where the first is, if they lie together, else where each is.
  struct Rows {
    int64_t first;
    RowIndex index;
  };
  Rows rows_of(const Segment& segment, Range range) const {
    const int32_t* at = segments_.order.data() + segment.begin + range.begin;
    const int64_t count = range.end - range.begin;
    if (at[count - 1] - at[0] == count - 1) return {at[0], {}};
    return {0, {at}};
  }
  Dropout dropout_at(const Rows& rows, int64_t column) const {
    Dropout own = dropout_;
    own.row_offset += rows.first, own.col_offset += column;
    return own;
  }

  // The part of S or dS, [M, max rank], that rows of a segment have: [count, rank].
  float* t_of(const at::Tensor& t, const Segment& segment, int64_t row) const {
    return t.mutable_data_ptr<float>() + segment.begin * t.size(1) + row * segment.rank;
  }

 private:
  AdapterView view(const std::vector<at::Tensor>& factors, int64_t rank_dim,
                   const Segment& segment) const {
    const bool pool = update_.is_pool();
    const at::Tensor& factor = factors[pool ? 0 : static_cast<size_t>(segment.adapter)];
    const int64_t dim = pool ? rank_dim + 1 : rank_dim, other = pool ? 2 - rank_dim : 1 - rank_dim;
    const auto* data = static_cast<const char*>(factor.const_data_ptr());
    if (pool) data += segment.adapter * factor.stride(0) * factor.element_size();
    return {data,
            dtype_of(factor.scalar_type()),
            factor.stride(dim),
            factor.stride(other),
            segment.rank,
            factor.size(other)};
  }

  const GroupedUpdate& update_;
  Segments segments_;
  at::Tensor scaling_;
  Dtype x_, y_;
  Dropout dropout_;
  float keep_scale_;
};

struct RowPiece {
  const Segment* segment;
  Range rows;
  int64_t work;
};

// Pieces of the rows of segments, whose work in a row is `columns` times the rank.
std::vector<RowPiece> pieces_of_rows(const Call& call, int64_t columns) {
  std::vector<RowPiece> pieces;
  const int64_t share = call.rows() / (4 * at::get_num_threads());
  for (const Segment& segment : call.segments()) {
    const int64_t granule = call.passes(segment).over_x->row_granule;
    const int64_t step = std::min(kPieceRows, round_up(std::max<int64_t>(share, 1), granule));
    for (int64_t row = 0; row < segment.count; row += step) {
      const Range rows{row, std::min(row + step, segment.count)};
      pieces.push_back(
          {&segment, rows, (rows.end - rows.begin + kPackRows) * columns * segment.rank});
    }
  }
  return pieces;
}

template <class Piece>
int64_t work_of(const std::vector<Piece>& pieces) {
  int64_t work = 0;
  for (const Piece& piece : pieces) work += piece.work;
  return work;
}

// Memory of one thread for one packed operand at a time.
class Scratch {
 public:
  void* of(int64_t bytes) {
    if (!memory_.defined() || memory_.numel() < bytes) memory_ = at::empty({bytes}, at::kByte);
    return memory_.mutable_data_ptr();
  }

 private:
  at::Tensor memory_;
};

// What a thread keeps from piece to piece.
struct Thread {
  const Segment* packed = nullptr;
  Scratch shrink, expand, t;
  const void *shrink_panel = nullptr, *expand_panel = nullptr;
};

const void* pack_shrink(const SkinnyKernels& kernels, const AdapterView& view, Scratch& scratch) {
  void* panel = scratch.of(kernels.shrink_panel_bytes(view.rank, view.cols));
  kernels.pack_shrink(view, panel);
  return panel;
}

const void* pack_expand(const SkinnyKernels& kernels, const AdapterView& view, Scratch& scratch) {
  void* panel = scratch.of(kernels.expand_panel_bytes(view.rank, view.cols));
  kernels.pack_expand(view, panel);
  return panel;
}

// T [rows, rank] in the layout that a pass reads: t itself, or packed.
const void* packed_t(const TLayout& layout, const float* t, int64_t rows, int64_t rank,
                     bool u_is_half, Scratch& scratch) {
  if (layout.bytes == nullptr) return t;
  void* packed = scratch.of(layout.bytes(rows, rank, u_is_half));
  layout.pack(t, rank, u_is_half, {0, rows}, packed);
  return packed;
}

// T = scale * drop(P) Q for the rows of a piece.
void shrink(const Call& call, const RowPiece& piece, const SkinnyKernels& kernels,
            const at::Tensor& p, const AdapterView& view, const void* panel, float scale,
            bool drops, float* t) {
  const Call::Rows rows = call.rows_of(*piece.segment, piece.rows);
  const auto* first =
      static_cast<const char*>(p.const_data_ptr()) + rows.first * p.stride(0) * p.element_size();
  kernels.shrink({first, dtype_of(p.scalar_type()), p.stride(0), view.cols, view.rank, panel,
                  view.dtype == Dtype::kBFloat16, scale, t,
                  drops ? call.dropout_at(rows, 0) : Dropout{}, rows.index},
                 {0, piece.rows.end - piece.rows.begin});
}

// Whether the vector kernels compute the call: they have no float64 and read no float16 factors
// where x and y are of two half types.
bool has_passes(at::ScalarType x, at::ScalarType y) {
  const bool two_halves = is_half(y) && is_half(x) && x != y;
  return x != at::kDouble && y != at::kDouble && !two_halves && kernels_for(dtype_of(x)) != nullptr;
}

// A gradient's place among those of a list, or in that of a pool.
class Gradient {
 public:
  Gradient(const GroupedUpdate& update, const std::vector<at::Tensor>& factors,
           const std::vector<bool>& wanted, int64_t rank_dim, const Call& call)
      : pool_(update.is_pool()), rank_dim_(rank_dim), each(factors.size()) {
    std::vector<bool> is_written(factors.size(), false);
    if (!pool_) {
      for (const Segment& segment : call.segments()) is_written[segment.adapter] = true;
    }
    for (size_t i = 0; i < factors.size(); ++i) {
      if (!wanted[i]) continue;
      each[i] = is_written[i] ? at::empty(factors[i].sizes(), factors[i].options())
                              : at::zeros(factors[i].sizes(), factors[i].options());
    }
  }

  bool wants(const Segment& segment) const { return of(segment).defined(); }

  // G of wgrad for columns from `column` on.
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
  std::vector<at::Tensor> each;
};

// Columns of one product of a segment: of dB over dY, or of dA over X with the expand onto dX.
struct ColumnPiece {
  const Segment* segment;
  bool over_x;
  Range columns;
  int64_t work;
};

void add_columns(std::vector<ColumnPiece>& pieces, const Segment& segment, bool over_x,
                 int64_t columns, int64_t total_work) {
  const int64_t per_column = (segment.count + kPackRows) * segment.rank;
  const int64_t share = std::max<int64_t>(1, total_work / (8 * at::get_num_threads()));
  const int64_t step = round_up(std::max<int64_t>(1, share / per_column), kColumnBlock);
  for (int64_t column = 0; column < columns; column += step) {
    const Range range{column, std::min(column + step, columns)};
    pieces.push_back({&segment, over_x, range, per_column * (range.end - range.begin)});
  }
}

// The address of an element of a row-major tensor.
char* at_element(const at::Tensor& tensor, int64_t row, int64_t column) {
  return static_cast<char*>(tensor.mutable_data_ptr()) +
         (row * tensor.stride(0) + column) * tensor.element_size();
}

const char* const_at_element(const at::Tensor& tensor, int64_t row, int64_t column) {
  return static_cast<const char*>(tensor.const_data_ptr()) +
         (row * tensor.stride(0) + column) * tensor.element_size();
}

WgradArgs wgrad_args(const Call& call, const ColumnPiece& piece, const at::Tensor& p,
                     const Call::Rows& rows, const void* t, float scale) {
  WgradArgs args{};
  args.p = const_at_element(p, rows.first, piece.columns.begin);
  args.dtype = dtype_of(p.scalar_type()), args.p_pitch = p.stride(0);
  args.rows = piece.segment->count, args.rank = piece.segment->rank;
  args.t = t, args.scale = scale, args.row_index = rows.index;
  if (piece.over_x) args.dropout = call.dropout_at(rows, piece.columns.begin);
  return args;
}

// A's columns of a piece, as a factor of its own.
AdapterView columns_of(AdapterView view, const Range& columns) {
  const int64_t size = view.dtype == Dtype::kFloat32 ? 4 : 2;
  view.data = static_cast<const char*>(view.data) + columns.begin * view.col_pitch * size;
  view.cols = columns.end - columns.begin;
  return view;
}

class BackwardPass {
 public:
  BackwardPass(const GroupedBackwardArgs& args, const Call& call)
      : args_(args),
        call_(call),
        da_(args.update, args.update.lora_a, args.need_dlora_a, 0, call),
        db_(args.update, args.update.lora_b, args.need_dlora_b, 1, call) {}

  GroupedBackward run() {
    if (args_.need_dx) dx_ = base_backward(args_.grad, args_.x, args_.base);
    make_ds();
    make_columns();
    return {dx_, da_.each, db_.each};
  }

 private:
  bool needs_ds(const Segment& segment) const { return args_.need_dx || da_.wants(segment); }

  void make_ds() {
    std::vector<RowPiece> pieces;
    for (const RowPiece& piece : pieces_of_rows(call_, args_.grad.size(1))) {
      if (needs_ds(*piece.segment)) pieces.push_back(piece);
    }
    if (pieces.empty()) return;
    ds_ = at::empty({args_.x.size(0), args_.update.max_rank()}, at::kFloat);
    const int64_t threads = threads_for(work_of(pieces));
    std::vector<Thread> state(static_cast<size_t>(threads));
    run_pieces(pieces, threads, [&](int64_t thread, const RowPiece& piece) {
      const Segment& segment = *piece.segment;
      const SkinnyKernels& kernels = *call_.passes(segment).over_y;
      const AdapterView b = call_.b(segment);
      Thread& own = state[static_cast<size_t>(thread)];
      if (own.packed != &segment) {
        own.packed = &segment;
        own.shrink_panel = pack_shrink(kernels, b, own.shrink);
      }
      shrink(call_, piece, kernels, args_.grad, b, own.shrink_panel, call_.scaling(segment), false,
             call_.t_of(ds_, segment, piece.rows.begin));
    });
  }

  void make_columns() {
    std::vector<ColumnPiece> pieces;
    int64_t work = 0;
    for (const Segment& segment : call_.segments()) {
      const int64_t columns =
          (db_.wants(segment) ? args_.grad.size(1) : 0) + (needs_ds(segment) ? args_.x.size(1) : 0);
      work += (segment.count + kPackRows) * segment.rank * columns;
    }
    for (const Segment& segment : call_.segments()) {
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

  // dB_g
  void over_y(const ColumnPiece& piece, Thread& own) {
    const Segment& segment = *piece.segment;
    const SkinnyKernels& kernels = *call_.passes(segment).over_y;
    const Call::Rows rows = call_.rows_of(segment, {0, segment.count});
    const void* t = packed_t(kernels.wgrad_t, call_.t_of(args_.s, segment, 0), segment.count,
                             segment.rank, false, own.t);
    WgradArgs args = wgrad_args(call_, piece, args_.grad, rows, t, call_.scaling(segment));
    db_.to(args, segment, piece.columns.begin);
    kernels.wgrad(args, ExpandArgs{}, {0, piece.columns.end - piece.columns.begin});
  }

  // dA_g, and dX += mask * (dS A_g)
  void over_x(const ColumnPiece& piece, Thread& own) {
    const Segment& segment = *piece.segment;
    const SkinnyKernels& kernels = *call_.passes(segment).over_x;
    const Call::Rows rows = call_.rows_of(segment, {0, segment.count});
    const float* ds = call_.t_of(ds_, segment, 0);
    ExpandArgs expand{};
    if (args_.need_dx) {
      const AdapterView a = columns_of(call_.a(segment), piece.columns);
      const bool is_half = a.dtype == Dtype::kBFloat16;
      expand.y = at_element(dx_, rows.first, piece.columns.begin);
      expand.dtype = dtype_of(dx_.scalar_type()), expand.y_pitch = dx_.stride(0);
      expand.cols = a.cols, expand.rank = a.rank, expand.u_is_half = is_half;
      expand.u = pack_expand(kernels, a, own.expand);
      expand.t = packed_t(kernels.expand_t, ds, segment.count, segment.rank, is_half, own.shrink);
      expand.scale = call_.keep_scale(), expand.rows = rows.index;
      expand.dropout = call_.dropout_at(rows, piece.columns.begin);
    }
    if (!da_.wants(segment)) return kernels.expand(expand, {0, segment.count});
    const void* t = packed_t(kernels.wgrad_t, ds, segment.count, segment.rank, false, own.t);
    WgradArgs args = wgrad_args(call_, piece, args_.x, rows, t, call_.keep_scale());
    da_.to(args, segment, piece.columns.begin);
    kernels.wgrad(args, expand, {0, piece.columns.end - piece.columns.begin});
  }

  const GroupedBackwardArgs& args_;
  const Call& call_;
  Gradient da_, db_;
  at::Tensor dx_, ds_;
};

}  // namespace

GroupedForward forward(const GroupedForwardArgs& args) {
  if (!has_passes(args.x.scalar_type(), args.y_dtype())) return library_route::forward(args);
  const int64_t rows = args.x.size(0);
  const Call call(args.update, segments_of(args.base.op(), args.update, rows), args.x.scalar_type(),
                  args.y_dtype());
  const at::Tensor y = base_forward(args.x, args.base);
  const at::Tensor s = at::empty({rows, args.update.max_rank()}, at::kFloat);
  const std::vector<RowPiece> pieces = pieces_of_rows(call, args.x.size(1) + y.size(1));
  const int64_t threads = threads_for(work_of(pieces));
  std::vector<Thread> state(static_cast<size_t>(threads));
  run_pieces(pieces, threads, [&](int64_t thread, const RowPiece& piece) {
    const Segment& segment = *piece.segment;
    const Passes passes = call.passes(segment);
    const AdapterView a = call.a(segment), b = call.b(segment);
    Thread& own = state[static_cast<size_t>(thread)];
    if (own.packed != &segment) {
      own.packed = &segment;
      own.shrink_panel = pack_shrink(*passes.over_x, a, own.shrink);
      own.expand_panel = pack_expand(*passes.over_y, b, own.expand);
    }
    float* t = call.t_of(s, segment, piece.rows.begin);
    const int64_t count = piece.rows.end - piece.rows.begin;
    shrink(call, piece, *passes.over_x, args.x, a, own.shrink_panel, call.keep_scale(), true, t);
    const Call::Rows where = call.rows_of(segment, piece.rows);
    const bool is_half = b.dtype == Dtype::kBFloat16;
    passes.over_y->expand({at_element(y, where.first, 0), call.y(), y.stride(0), b.cols, b.rank,
                           own.expand_panel, is_half, call.scaling(segment),
                           packed_t(passes.over_y->expand_t, t, count, b.rank, is_half, own.t),
                           Dropout{}, where.index},
                          {0, count});
  });
  return {y, s};
}

GroupedBackward backward(const GroupedBackwardArgs& args) {
  if (!has_passes(args.x.scalar_type(), args.grad.scalar_type())) {
    return library_route::backward(args);
  }
  const Call call(args.update, segments_of(args.base.op(), args.update, args.x.size(0)),
                  args.x.scalar_type(), args.grad.scalar_type());
  return BackwardPass(args, call).run();
}

}  // namespace lora_ext::cpu
