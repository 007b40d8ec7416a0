// A call prepared for the skinny passes: the rows, factors and sums of each segment, and how the work
// is cut into pieces for threads. One adapter has one segment of all rows.
#pragma once

#include <ATen/ops/empty.h>
#include <c10/util/ArrayRef.h>
#include <c10/util/SmallVector.h>

#include <optional>
#include <vector>

#include "common/rows.h"
#include "cpu/driver.h"
#include "cpu/skinny.h"

namespace lora_ext::cpu {

class Groups {
 public:
  Groups(const ForwardArgs& args, const Experts* experts);
  Groups(const BackwardArgs& args, const Experts* experts);

  // The dtype of the panels if the base and all low-rank parts are computed in one pass.
  std::optional<Dtype> panel() const { return panel_; }
  // The most rows of a segment for which factors are read in their original layout.
  int64_t few_rows() const { return few_rows_; }
  bool is_one() const { return update_.is_one(); }
  bool is_one_of_few_rows() const { return is_one() && rows() <= few_rows_; }
  c10::ArrayRef<Segment> segments() const { return segments_.list; }
  int64_t rows() const {
    return is_one() ? segments_.list[0].count : static_cast<int64_t>(segments_.order.size());
  }
  Passes passes(const Segment& segment) const;

  float scaling(const Segment& segment) const {
    return is_one() ? static_cast<float>(update_.scaling)
                    : scaling_.const_data_ptr<float>()[segment.adapter];
  }
  float keep_scale() const { return keep_scale_; }
  AdapterView a(const Segment& segment) const { return view(update_.lora_a, 0, segment); }
  AdapterView b(const Segment& segment) const { return view(update_.lora_b, 1, segment); }

  // Some rows of a segment: the first one if they are contiguous, else the index of each.
  struct Rows {
    int64_t first;
    RowIndex index;
  };
  Rows rows_of(const Segment& segment, Range range) const;
  // All `rows` rows of the call in the order of the segments, then those without an adapter; empty
  // if they stay in their own order: each segment has consecutive rows, or the rows are of experts,
  // which stay together only so.
  std::vector<int32_t> order_of_all(int64_t rows) const;
  // Where the consecutive rows of a segment end that begin at `row`.
  int64_t end_of_run(const Segment& segment, int64_t row) const;
  int64_t first_row(const Segment& segment) const { return rows_of(segment, {0, 1}).first; }
  const Dropout& dropout() const { return dropout_; }
  // The mask for those rows, from `column` on.
  Dropout dropout_at(const Rows& rows, int64_t column) const;

  // The passes take S and dS of a segment as dense [rows, rank]. A temporary T is stored this way.
  // S is [M, max rank] with the rows in the order of x, so a segment's part may or may not be dense.
  static float* dense_part(const at::Tensor& t, const Segment& segment, int64_t row) {
    return t.mutable_data_ptr<float>() + segment.begin * t.size(1) + row * segment.rank;
  }
  // The address in S if the passes can use it in place; else nullptr.
  float* s_in_place(const at::Tensor& s, const Segment& segment, Range rows) const;
  // Whether all parts are dense in S itself, as with one adapter.
  bool is_dense(const at::Tensor& s) const;
  void scatter_s(const at::Tensor& s, const Segment& segment, Range rows, const float* from) const;
  // S in dense parts.
  at::Tensor dense_s(const at::Tensor& s) const;

 private:
  // p: x or the gradient of y, as it is multiplied by the base, if that is wanted.
  Groups(const Update& update, const Base& base, const at::Tensor& x, at::ScalarType y,
         const at::Tensor& p, bool is_forward, const Experts* experts);
  std::optional<Dtype> panel_of(const at::Tensor& p, const Base& base, bool is_forward,
                                const Experts* experts) const;
  bool are_consecutive() const;
  AdapterView view(at::TensorList factors, int64_t rank_dim, const Segment& segment) const;

  const Update& update_;
  Segments segments_;
  at::Tensor scaling_;
  Dtype x_, y_;
  Dropout dropout_;
  float keep_scale_;
  bool uses_tiles_, keeps_order_;
  std::optional<Dtype> panel_;
  int64_t few_rows_;
};

// Rows of one segment, with all ranks or, of one row, some; work in multiply-adds.
struct RowPiece {
  const Segment* segment;
  Range rows, ranks;
  int64_t work;
};
using RowPieces = c10::SmallVector<RowPiece, 1>;
// The pieces of all segments; the work for one row is `columns` times the rank.
RowPieces pieces_of_rows(const Groups& groups, int64_t columns);

// Columns of one product of a segment: of dB, a product with dY, or of dA, a product with X,
// together with the expand onto dX; in a forward of few rows, of the expand onto Y.
struct ColumnPiece {
  const Segment* segment;
  bool over_x;
  Range columns;
  int64_t work;
};
using ColumnPieces = c10::SmallVector<ColumnPiece, 2>;
// total: the work for the columns of all segments.
void add_columns(ColumnPieces& pieces, const Groups& groups, const Segment& segment, bool over_x,
                 int64_t columns, int64_t per_column, int64_t total);
int64_t work_of_column(const Segment& segment);

// T of each segment as a pass over columns reads it: dense, or packed once for all columns.
class ColumnT {
 public:
  // t: in dense parts; side and layout: those of the pass.
  ColumnT(const Groups& groups, at::Tensor t, const SkinnyKernels* Passes::* side,
          TLayout SkinnyKernels::* layout, bool u_is_half = false);
  const void* of(const Groups& groups, const Segment& segment) const {
    const int64_t offset = offsets_[&segment - groups.segments().data()];
    if (offset < 0) return Groups::dense_part(t_, segment, 0);
    return static_cast<const char*>(memory_.const_data_ptr()) + offset;
  }

 private:
  at::Tensor t_, memory_;
  c10::SmallVector<int64_t, 1> offsets_;  // of each segment in memory; or -1: dense
};

// Memory of one thread, which grows to the size that is asked for.
class Scratch {
 public:
  void* of(int64_t bytes) {
    if (!memory_.defined() || memory_.numel() < bytes) memory_ = at::empty({bytes}, at::kByte);
    return memory_.mutable_data_ptr();
  }

 private:
  at::Tensor memory_;
};

// A factor of one adapter for the passes of one thread: packed once for consecutive pieces of a
// segment, or in its original layout if the segment has few rows.
class Factor {
 public:
  void for_shrink(const Segment& segment, const AdapterView& view, const SkinnyKernels& kernels,
                  int64_t few_rows) {
    if (!is_to_pack(segment, view, kernels, few_rows)) return;
    const int64_t bytes = kernels.shrink_panel_bytes(view.rank, view.cols);
    panel_ = scratch_.of(bytes + kernels.shrink_bytes(view.rank));
    work_ = static_cast<char*>(panel_) + bytes;
    kernels.pack_shrink(view, panel_);
  }
  void for_expand(const Segment& segment, const AdapterView& view, const SkinnyKernels& kernels,
                  int64_t few_rows) {
    if (is_to_pack(segment, view, kernels, few_rows)) pack_expand();
  }

  // Some columns of a factor, for the expand alone or together with wgrad: packed in every call.
  void for_columns(const AdapterView& view, const SkinnyKernels& kernels, bool few) {
    kernels_ = &kernels, view_ = view, few_ = few, packed_ = nullptr;
    if (!few_) pack_expand();
  }

  const AdapterView& view() const { return view_; }
  bool is_half() const { return view_.dtype == Dtype::kBFloat16; }
  const void* panel() const { return panel_; }
  void* work() const { return work_; }  // behind the panel of shrink

  void shrink(const ShrinkArgs& args, int64_t rows) const {
    few_ ? kernels_->shrink_few(args, view_, {0, rows}) : kernels_->shrink(args, {0, rows});
  }
  void expand(const ExpandArgs& args, int64_t rows) const {
    few_ ? kernels_->expand_few(args, view_, {0, rows}) : kernels_->expand(args, {0, rows});
  }

 private:
  void pack_expand() {
    panel_ = scratch_.of(kernels_->expand_panel_bytes(view_.rank, view_.cols));
    kernels_->pack_expand(view_, panel_);
  }
  bool is_to_pack(const Segment& segment, const AdapterView& view, const SkinnyKernels& kernels,
                  int64_t few_rows) {
    kernels_ = &kernels, view_ = view;
    few_ = segment.count <= few_rows && (view.col_pitch == 1 || view.rank_pitch == 1);
    const bool is_new = packed_ != &segment;
    packed_ = &segment;
    return is_new && !few_;
  }

  const Segment* packed_ = nullptr;
  const SkinnyKernels* kernels_ = nullptr;
  AdapterView view_{};
  bool few_ = false;
  Scratch scratch_;
  void *panel_ = nullptr, *work_ = nullptr;
};

// T [rows, rank] in the layout that a pass reads: t itself, or packed.
inline const void* packed_t(const TLayout& layout, const float* t, int64_t rows, int64_t rank,
                            bool u_is_half, Scratch& scratch) {
  if (layout.bytes == nullptr) return t;
  void* packed = scratch.of(layout.bytes(rows, rank, u_is_half));
  layout.pack(t, rank, u_is_half, {0, rows}, packed);
  return packed;
}

}  // namespace lora_ext::cpu
