// What forward and backward of many adapters share: the operands of a pass over some rows of a
// segment, and the low-rank parts of a product in one pass.
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

// Rows of an adapter, on average, from which on its low-rank part is computed in the tiles: fewer do
// not pay for packing 64 columns of a factor. With 8 rows for each of 32 adapters at K = N = 1024
// both ways take the same time.
constexpr int64_t kFewRowsOfAdapter = 8;

inline int64_t size_of(const Range& range) { return range.end - range.begin; }

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
  args.p = const_at_element(p, rows.first, 0);
  return args;
}

// Y += scale * mask * (T U) for rows of Y, from `column` on.
inline ExpandArgs expand_args(const at::Tensor& y, const Groups::Rows& rows, int64_t column,
                              const Factor& u, float scale, const void* t, const Dropout& dropout) {
  ExpandArgs args = expand_args(y, u.view(), u.panel(), scale, t, dropout, rows.index);
  args.y = at_element(y, rows.first, column);
  return args;
}

// Whether the vector kernels can compute the call: they do not support float64, nor float16 factors
// if x and y have different half types.
inline bool has_passes(at::ScalarType x, at::ScalarType y) {
  const bool two_halves = is_half(y) && is_half(x) && x != y;
  return x != at::kDouble && y != at::kDouble && !two_halves && kernels_for(dtype_of(x)) != nullptr;
}

// The dtype of the panels if the base of P, x or dY, and all low-rank parts are computed in one pass.
// A batch-invariant call has the passes for any number of rows.
inline std::optional<Dtype> panel_of(const Groups& groups, const at::Tensor& p, const Base& base,
                                     bool is_forward) {
  const auto segments = static_cast<int64_t>(groups.segments().size());
  const bool has_rows = groups.rows() >= kFewRowsOfAdapter * segments;
  if (!has_rows || base.row_block != 0) return {};
  // The rows of an expert stay together only in their own order.
  if (!base.experts.empty() && !groups.order_of_all(p.size(0)).empty()) return {};
  return fused_panel(p, base, is_forward);
}

// T U of all segments, in the order of Groups::order_of_all; T is stored by dense parts.
template <class ViewOf, class ScaleOf>
LowRank low_rank_of(const Groups& groups, const std::vector<int32_t>& order, const at::Tensor& t,
                    const ViewOf& view_of, const ScaleOf& scale_of) {
  LowRank found;
  for (const Segment& segment : groups.segments()) {
    const int64_t first = order.empty() ? groups.first_row(segment) : segment.begin;
    found.updates.push_back({{first, first + segment.count},
                             Groups::dense_part(t, segment, 0),
                             view_of(segment),
                             scale_of(segment)});
  }
  std::sort(found.updates.begin(), found.updates.end(),
            [](const RowUpdate& a, const RowUpdate& b) { return a.rows.begin < b.rows.begin; });
  found.rows.at = order.empty() ? nullptr : order.data();
  return found;
}

}  // namespace lora_ext::cpu
