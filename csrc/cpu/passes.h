// What forward and backward share: the operands of a pass over some rows of a segment, and the
// low-rank parts of a product in one pass.
#pragma once

#include <algorithm>
#include <optional>
#include <vector>

#include "cpu/dispatch.h"
#include "cpu/driver.h"
#include "cpu/groups.h"
#include "cpu/operands.h"
#include "cpu/work_split.h"

namespace lora_ext::cpu {

inline int64_t size_of(const Range& range) { return range.end - range.begin; }

// What a thread keeps for the next piece.
struct Thread {
  Factor a, b;
  Scratch s, t;
};

inline const char* const_at_element(const at::Tensor& tensor, int64_t row, int64_t column) {
  return static_cast<const char*>(tensor.const_data_ptr()) +
         (row * tensor.stride(0) + column) * tensor.element_size();
}

inline char* at_element(const at::Tensor& tensor, int64_t row, int64_t column) {
  return static_cast<char*>(tensor.mutable_data_ptr()) +
         (row * tensor.stride(0) + column) * tensor.element_size();
}

// T = scale * drop(P) Q for rows of P.
inline ShrinkArgs shrink_args(const at::Tensor& p, const Groups::Rows& rows, const Factor& q,
                              float scale, float* t, const Dropout& dropout) {
  ShrinkArgs args = shrink_args(p, q.view(), q.panel(), scale, t, dropout, rows.index);
  args.p = const_at_element(p, rows.first, 0), args.work = q.work();
  return args;
}

// Y += scale * mask * (T U) for rows of Y, from `column` on.
inline ExpandArgs expand_args(const at::Tensor& y, const Groups::Rows& rows, int64_t column,
                              const Factor& u, float scale, const void* t, const Dropout& dropout) {
  return {at_element(y, rows.first, column),
          dtype_of(y.scalar_type()),
          y.stride(0),
          u.view().cols,
          u.view().rank,
          u.panel(),
          u.is_half(),
          scale,
          t,
          dropout,
          rows.index};
}

// The same for some columns of Y; u becomes those of the factor, packed unless it is read as it is.
inline ExpandArgs expand_args(const at::Tensor& y, const Groups& groups, const ColumnPiece& piece,
                              Factor& u, const AdapterView& factor, const SkinnyKernels& kernels,
                              float scale, const void* t, const Dropout& dropout) {
  const Segment& segment = *piece.segment;
  u.for_columns(part_of(factor, {0, segment.rank}, piece.columns), kernels,
                groups.is_one_of_few_rows());
  return expand_args(y, groups.rows_of(segment, {0, segment.count}), piece.columns.begin, u, scale,
                     t, dropout);
}

// The ranks of a piece in a factor.
inline AdapterView ranks_of(const AdapterView& factor, const RowPiece& piece) {
  return part_of(factor, piece.ranks, {0, factor.cols});
}

inline bool takes_library(const at::Tensor& x, at::ScalarType y, const Update& update) {
  return !library_reason(x.scalar_type(), y, update.rank()).empty();
}

// None if it is undefined.
inline MaskBits bits_of(const at::Tensor& mask) {
  if (!mask.defined()) return {};
  return {reinterpret_cast<uint32_t*>(mask.mutable_data_ptr<int32_t>()), mask.size(1)};
}

// The mask of a product's rows and so many columns, in whole blocks of 64: [rows, words].
inline at::Tensor drawn_mask(const Dropout& dropout, RowIndex index, int64_t rows, int64_t cols) {
  const at::Tensor mask = at::empty({rows, 2 * divide_up(cols, 64)}, at::kInt);
  const int64_t threads = threads_for(4 * rows * cols);  // as long as 4 multiply-adds
  at::parallel_for(0, rows, divide_up(rows, threads), [&](int64_t begin, int64_t end) {
    kernels_for(Dtype::kBFloat16)
        ->dropout_bits(dropout, index, {begin, end}, {0, cols}, bits_of(mask).at(begin, 0).words,
                       mask.size(1));
  });
  return mask;
}

// Whether the product in one pass that reads P, of so many columns, makes T of all rows itself.
inline bool makes_own_t(const Groups& groups, const Experts* experts, int64_t cols,
                        bool is_forward) {
  const TileWalk* walk = groups.panel() ? tile_walk(*groups.panel()) : nullptr;
  if (walk == nullptr) return false;
  if (walk->makes_t == nullptr) return true;
  if (!groups.is_one() || experts != nullptr) return false;
  const Segment& all = groups.segments()[0];
  const AdapterView q = is_forward ? groups.a(all) : groups.b(all);
  return walk->makes_t(cols, q, is_forward && groups.dropout().enabled());
}

// T U of all segments, in the order of Groups::order_of_all; T is stored by dense parts.
inline LowRank low_rank_of(const Groups& groups, const std::vector<int32_t>& order,
                           const at::Tensor& t, bool is_forward) {
  LowRank found;
  for (const Segment& segment : groups.segments()) {
    for (int64_t row = 0, end = 0; row < segment.count; row = end) {
      end = order.empty() ? groups.end_of_run(segment, row) : segment.count;
      const int64_t first =
          order.empty() ? groups.rows_of(segment, {row, end}).first : segment.begin;
      const AdapterView factors[] = {groups.a(segment), groups.b(segment)};
      const float scales[] = {groups.keep_scale(), groups.scaling(segment)};
      found.updates.push_back({{first, first + end - row},
                               Groups::dense_part(t, segment, row),
                               factors[is_forward],
                               scales[is_forward],
                               factors[!is_forward],
                               scales[!is_forward]});
    }
  }
  std::sort(found.updates.begin(), found.updates.end(),
            [](const RowUpdate& a, const RowUpdate& b) { return a.rows.begin < b.rows.begin; });
  found.rows.at = order.empty() ? nullptr : order.data();
  if (!is_forward) found.dropout = groups.dropout();
  return found;
}

}  // namespace lora_ext::cpu
