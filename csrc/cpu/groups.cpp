#include "cpu/groups.h"

#include <ATen/Parallel.h>

#include <algorithm>

#include "cpu/dispatch.h"
#include "cpu/operands.h"

namespace lora_ext::cpu {
namespace {

constexpr int64_t kPieceRows = 96;     // whole blocks of every instruction set's shrink
constexpr int64_t kColumnBlock = 128;  // wgrad's block of columns
constexpr int64_t kPackRows = 4;       // packing a factor takes as long as this number of rows

// AMX tiles are used from this number of rows of one adapter on; up to 32 rows the vector code
// reads a factor in its original layout. With tiles from 16 rows on, 16 rows for each of 8 adapters
// at K = N = 2048 took 1.46 times the merged layer and a training step 1.70 times the frozen one;
// with vector code 1.32 and 1.40.
constexpr int64_t kTileRows = 33;

}  // namespace

Groups::Groups(const Update& update, Segments segments, at::ScalarType x, at::ScalarType y,
               bool any_number)
    : update_(update),
      segments_(std::move(segments)),
      scaling_(update.grouping->scaling.contiguous()),
      x_(dtype_of(x)),
      y_(dtype_of(y)),
      dropout_(dropout_of(update.dropout)),
      keep_scale_(dropout_.enabled() ? static_cast<float>(update.dropout.keep_scale()) : 1.f),
      any_number_(any_number) {}

Passes Groups::passes(const Segment& segment) const {
  // Tiles round S of a given y in bfloat16 to two terms: other bits than vector code has.
  if (segment.count >= kTileRows && !any_number_) return {kernels_for(x_), kernels_for(y_)};
  return {kernels_for_few_rows(), kernels_for_few_rows()};
}

Groups::Rows Groups::rows_of(const Segment& segment, Range range) const {
  const int32_t* at = segments_.order.data() + segment.begin + range.begin;
  const int64_t count = range.end - range.begin;
  if (at[count - 1] - at[0] == count - 1) return {at[0], {}};
  return {0, {at}};
}

std::vector<int32_t> Groups::order_of_all(int64_t rows) const {
  const std::vector<Segment>& list = segments_.list;
  const bool are_consecutive = std::all_of(list.begin(), list.end(), [&](const Segment& segment) {
    return rows_of(segment, {0, segment.count}).index.at == nullptr;
  });
  if (are_consecutive) return {};
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

void Groups::gather_s(const at::Tensor& s, const Segment& segment, Range rows, float* to) const {
  const int32_t* at = segments_.order.data() + segment.begin;
  for (int64_t m = rows.begin; m < rows.end; ++m, to += segment.rank) {
    std::copy_n(s.const_data_ptr<float>() + at[m] * s.size(1), segment.rank, to);
  }
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

std::vector<RowPiece> pieces_of_rows(const Groups& groups, int64_t columns) {
  std::vector<RowPiece> pieces;
  const int64_t share = groups.rows() / (4 * at::get_num_threads());
  for (const Segment& segment : groups.segments()) {
    const int64_t granule = groups.passes(segment).over_x->row_granule;
    const int64_t step = std::min(kPieceRows, round_up(std::max<int64_t>(share, 1), granule));
    for (int64_t row = 0; row < segment.count; row += step) {
      const Range rows{row, std::min(row + step, segment.count)};
      pieces.push_back(
          {&segment, rows, (rows.end - rows.begin + kPackRows) * columns * segment.rank});
    }
  }
  return pieces;
}

int64_t work_of_column(const Segment& segment) {
  return (segment.count + kPackRows) * segment.rank;
}

void add_columns(std::vector<ColumnPiece>& pieces, const Segment& segment, bool over_x,
                 int64_t columns, int64_t total) {
  const int64_t per_column = work_of_column(segment);
  const int64_t share = std::max<int64_t>(1, total / (8 * at::get_num_threads()));
  const int64_t step = round_up(std::max<int64_t>(1, share / per_column), kColumnBlock);
  for (int64_t column = 0; column < columns; column += step) {
    const Range range{column, std::min(column + step, columns)};
    pieces.push_back({&segment, over_x, range, per_column * (range.end - range.begin)});
  }
}

}  // namespace lora_ext::cpu
