#include "cpu/groups.h"

#include <ATen/Parallel.h>

#include <algorithm>

#include "cpu/dispatch.h"
#include "cpu/operands.h"
#include "cpu/work_split.h"

namespace lora_ext::cpu {
namespace {

constexpr int64_t kPieceRows = 96;     // whole blocks of every instruction set's shrink
constexpr int64_t kColumnBlock = 128;  // wgrad's block of columns
constexpr int64_t kColumnSlab = 512;   // what it draws a mask for at a time
constexpr int64_t kRankGranule = 16;   // of ranges of ranks
constexpr int64_t kPackRows = 4;       // packing a factor takes as long as this number of rows

// With many adapters, one with so many rows at most has its factors read in their original
// layout, in vector code; others use tiles where there are any. With tiles from 16 rows on, 16
// rows for each of 8 adapters at K = N = 2048 took 1.46 times the merged layer and a training
// step 1.70 times the frozen one; with vector code 1.32 and 1.40.
constexpr int64_t kFewRows = 32;
// One adapter: packing costs rank * (K + N), independent of the rows. Up to these numbers of rows it
// costs more than the passes save, and above kHighRank up to kFewRows. Measured at K = N = 1024 and
// 4096 with 1 and 16 rows, ranks 16 and 64.
constexpr int64_t kFewForwardRows = 16;
constexpr int64_t kFewBackwardRows = 7;
constexpr int64_t kHighRank = 32;

// Rows of an adapter, on average, from which on its low-rank part is computed in the tiles: fewer do
// not pay for packing 64 columns of a factor. With 8 rows for each of 32 adapters at K = N = 1024
// both ways take the same time.
constexpr int64_t kFusedRows = 8;

// One adapter is read in the original layout with unit stride along the columns of lora_a or its
// rank, and along the rank of lora_b.
int64_t few_rows_of_one(const Update& update, bool is_forward) {
  const AdapterView a = view_of(update.a(), 0), b = view_of(update.b(), 1);
  if ((a.col_pitch != 1 && a.rank_pitch != 1) || b.rank_pitch != 1) return 0;
  if (update.rank() > kHighRank) return kFewRows;
  return is_forward ? kFewForwardRows : kFewBackwardRows;
}

}  // namespace

Groups::Groups(const ForwardArgs& args, const Experts* experts)
    : Groups(args.update, args.base, args.x, args.y_dtype(), args.x, true, experts) {}

Groups::Groups(const BackwardArgs& args, const Experts* experts)
    : Groups(args.update, args.base, args.x, args.grad.scalar_type(),
             args.wanted.dx ? args.grad : at::Tensor(), false, experts) {}

Groups::Groups(const Update& update, const Base& base, const at::Tensor& x, at::ScalarType y,
               const at::Tensor& p, bool is_forward, const Experts* experts)
    : update_(update),
      segments_(update.is_one() ? Segments{{{0, 0, x.size(0), update.rank()}}, {}}
                                : segments_of(base.op(), update, x.size(0))),
      scaling_(update.is_one() ? at::Tensor() : update.grouping->scaling.contiguous()),
      x_(dtype_of(x.scalar_type())),
      y_(dtype_of(y)),
      dropout_(dropout_of(update.dropout)),
      keep_scale_(experts == nullptr ? static_cast<float>(update.dropout.keep_scale()) : 1.f),
      uses_tiles_(update.is_one() || base.row_block == 0),
      keeps_order_(experts != nullptr) {
  if (experts != nullptr && experts->mask_rows) {
    dropout_.rows = experts->mask_rows->const_data_ptr<int64_t>();
  }
  if (p.defined()) panel_ = panel_of(p, base, is_forward, experts);
  // In batch-invariant calls a row has the same passes in any number of rows.
  if (base.row_block != 0) {
    few_rows_ = 0;
  } else if (!is_one()) {
    few_rows_ = kFewRows;
  } else {
    few_rows_ = panel_ ? 0 : few_rows_of_one(update, is_forward);
  }
}

std::optional<Dtype> Groups::panel_of(const at::Tensor& p, const Base& base, bool is_forward,
                                      const Experts* experts) const {
  // Any rows of batch-invariant calls are rounded once, as those of one adapter are.
  const bool is_invariant = base.row_block != 0;
  const auto has_rows = [&](int64_t of_each) {
    return is_one() || is_invariant || rows() >= of_each * static_cast<int64_t>(segments().size());
  };
  if (!has_rows(kFusedRows)) return {};
  // The rows of an expert stay together only in their own order, where an update has a few each.
  if (keeps_order_ && !is_invariant && !are_consecutive()) return {};
  const std::optional<Dtype> panel = fused_panel(p, base, experts, is_forward);
  const TileWalk* walk = panel ? tile_walk(*panel) : nullptr;
  return walk == nullptr || has_rows(walk->least_own_rows) ? panel : std::nullopt;
}

Passes Groups::passes(const Segment& segment) const {
  // Tiles round S of a given y in bfloat16 to two terms: other bits than vector code has.
  if (segment.count > few_rows_ && uses_tiles_) return {kernels_for(x_), kernels_for(y_)};
  return {kernels_for_few_rows(), kernels_for_few_rows()};
}

Groups::Rows Groups::rows_of(const Segment& segment, Range range) const {
  if (is_one()) return {range.begin, {}};
  const int32_t* at = segments_.order.data() + segment.begin + range.begin;
  const int64_t count = range.end - range.begin;
  if (at[count - 1] - at[0] == count - 1) return {at[0], {}};
  return {0, {at}};
}

bool Groups::are_consecutive() const {
  const c10::ArrayRef<Segment> list = segments();
  return std::all_of(list.begin(), list.end(), [&](const Segment& segment) {
    return rows_of(segment, {0, segment.count}).index.at == nullptr;
  });
}

int64_t Groups::end_of_run(const Segment& segment, int64_t row) const {
  if (rows_of(segment, {row, segment.count}).index.at == nullptr) return segment.count;
  const int32_t* at = segments_.order.data() + segment.begin;
  int64_t end = row + 1;
  while (end < segment.count && at[end] == at[end - 1] + 1) ++end;
  return end;
}

std::vector<int32_t> Groups::order_of_all(int64_t rows) const {
  if (keeps_order_ || are_consecutive()) return {};
  std::vector<int32_t> order = segments_.order;
  std::vector<bool> has_adapter(static_cast<size_t>(rows), false);
  for (const int32_t row : order) has_adapter[static_cast<size_t>(row)] = true;
  for (int64_t row = 0; row < rows; ++row) {
    if (!has_adapter[static_cast<size_t>(row)]) order.push_back(static_cast<int32_t>(row));
  }
  return order;
}

Dropout Groups::dropout_at(const Rows& rows, int64_t column) const {
  Dropout own = dropout_;
  own.row_offset += rows.first, own.col_offset += column;
  return own;
}

float* Groups::s_in_place(const at::Tensor& s, const Segment& segment, Range rows) const {
  const Rows where = rows_of(segment, rows);
  if (where.index.at != nullptr || segment.rank != s.size(1)) return nullptr;
  return s.mutable_data_ptr<float>() + where.first * s.size(1);
}

void Groups::scatter_s(const at::Tensor& s, const Segment& segment, Range rows,
                       const float* from) const {
  const int32_t* at = segments_.order.data() + segment.begin;
  for (int64_t m = rows.begin; m < rows.end; ++m, from += segment.rank) {
    std::copy_n(from, segment.rank, s.mutable_data_ptr<float>() + at[m] * s.size(1));
  }
}

bool Groups::is_dense(const at::Tensor& s) const {
  return std::all_of(segments().begin(), segments().end(), [&](const Segment& segment) {
    return s_in_place(s, segment, {0, segment.count}) == dense_part(s, segment, 0);
  });
}

at::Tensor Groups::dense_s(const at::Tensor& s) const {
  if (is_dense(s)) return s;
  const at::Tensor dense = at::empty(s.sizes(), at::kFloat);
  const RowPieces pieces = pieces_of_rows(*this, 1);
  run_pieces(pieces, threads_for(work_of(pieces)), [&](int64_t, const RowPiece& piece) {
    const Segment& segment = *piece.segment;
    const int32_t* at = segments_.order.data() + segment.begin;
    float* to = dense_part(dense, segment, piece.rows.begin);
    for (int64_t m = piece.rows.begin; m < piece.rows.end; ++m, to += segment.rank) {
      std::copy_n(s.const_data_ptr<float>() + at[m] * s.size(1), segment.rank, to);
    }
  });
  return dense;
}

AdapterView Groups::view(at::TensorList factors, int64_t rank_dim, const Segment& segment) const {
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

RowPieces pieces_of_rows(const Groups& groups, int64_t columns) {
  RowPieces pieces;
  int64_t work = 0;
  for (const Segment& segment : groups.segments()) work += work_of_column(segment) * columns;
  const int64_t threads = threads_for(work), all = groups.rows();
  const bool few = groups.is_one_of_few_rows();
  const int64_t share = few || threads == 1 ? divide_up(all, threads) : all / (4 * threads);
  for (const Segment& segment : groups.segments()) {
    const int64_t granule = few ? 1 : groups.passes(segment).over_x->row_granule;
    const int64_t step = std::min(kPieceRows, round_up(std::max<int64_t>(share, 1), granule));
    const int64_t ranks =
        few && all == 1 ? round_up(divide_up(segment.rank, threads), kRankGranule) : segment.rank;
    for (int64_t row = 0; row < segment.count; row += step) {
      const Range rows{row, std::min(row + step, segment.count)};
      for (int64_t rank = 0; rank < segment.rank; rank += ranks) {
        const Range own{rank, std::min(rank + ranks, segment.rank)};
        pieces.push_back({&segment, rows, own,
                          (rows.end - rows.begin + kPackRows) * columns * (own.end - own.begin)});
      }
    }
  }
  return pieces;
}

int64_t work_of_column(const Segment& segment) {
  return (segment.count + kPackRows) * segment.rank;
}

void add_columns(ColumnPieces& pieces, const Groups& groups, const Segment& segment, bool over_x,
                 int64_t columns, int64_t per_column, int64_t total) {
  const Passes passes = groups.passes(segment);
  const int64_t granule = (over_x ? passes.over_x : passes.over_y)->col_granule;
  const int64_t threads = groups.is_one() ? threads_for(total) : 2 * at::get_num_threads();
  const int64_t share = std::max<int64_t>(1, total / (4 * threads) / per_column);
  // Of one adapter in whole slabs of wgrad, unless there are fewer columns than threads times that.
  const int64_t step =
      groups.is_one()
          ? round_up(std::min(divide_up(columns, threads), std::max(share, kColumnSlab)), granule)
          : round_up(share, kColumnBlock);
  for (int64_t column = 0; column < columns; column += step) {
    const Range range{column, std::min(column + step, columns)};
    pieces.push_back({&segment, over_x, range, per_column * (range.end - range.begin)});
  }
}

ColumnT::ColumnT(const Groups& groups, at::Tensor t, const SkinnyKernels* Passes::* side,
                 TLayout SkinnyKernels::* layout, bool u_is_half)
    : t_(std::move(t)) {
  const auto layout_of = [&](const Segment& segment) -> const TLayout& {
    return groups.passes(segment).*side->*layout;
  };
  RowPieces pieces;
  int64_t bytes = 0;
  for (const Segment& segment : groups.segments()) {
    const TLayout& own = layout_of(segment);
    offsets_.push_back(own.bytes == nullptr ? -1 : bytes);
    if (own.bytes == nullptr) continue;
    bytes += round_up(own.bytes(segment.count, segment.rank, u_is_half), 64);
    const int64_t step = round_up(kPieceRows, own.row_granule);
    for (int64_t row = 0; row < segment.count; row += step) {
      const Range rows{row, std::min(row + step, segment.count)};
      pieces.push_back({&segment, rows, {}, 8 * (rows.end - rows.begin) * segment.rank});
    }
  }
  if (pieces.empty()) return;
  memory_ = at::empty({bytes}, at::kByte);
  char* memory = static_cast<char*>(memory_.mutable_data_ptr());
  run_pieces(pieces, threads_for(work_of(pieces)), [&](int64_t, const RowPiece& piece) {
    const Segment& segment = *piece.segment;
    layout_of(segment).pack(Groups::dense_part(t_, segment, 0), segment.rank, u_is_half, piece.rows,
                            memory + offsets_[&segment - groups.segments().data()]);
  });
}

}  // namespace lora_ext::cpu
