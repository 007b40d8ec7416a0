// A call with many adapters, prepared for the skinny passes: the rows, factors and sums of each
// segment, and how the work is cut into pieces for threads.
#pragma once

#include <ATen/ops/empty.h>

#include <vector>

#include "common/rows.h"
#include "cpu/skinny.h"

namespace lora_ext::cpu {

class Groups {
 public:
  // any_number: a row's bits must not depend on the number of rows of its adapter.
  Groups(const Update& update, Segments segments, at::ScalarType x, at::ScalarType y,
         bool any_number);

  // The most rows of a segment for which factors are read in their original layout.
  int64_t few_rows(const SkinnyKernels& kernels) const {
    return any_number_ ? 0 : kernels.few_rows;
  }
  const std::vector<Segment>& segments() const { return segments_.list; }
  int64_t rows() const { return static_cast<int64_t>(segments_.order.size()); }
  Passes passes(const Segment& segment) const;

  float scaling(const Segment& segment) const {
    return scaling_.const_data_ptr<float>()[segment.adapter];
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
  // if each segment has consecutive rows, which then stay in their own order.
  std::vector<int32_t> order_of_all(int64_t rows) const;
  int64_t first_row(const Segment& segment) const { return segments_.order[segment.begin]; }
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
  void scatter_s(const at::Tensor& s, const Segment& segment, Range rows, const float* from) const;
  void gather_s(const at::Tensor& s, const Segment& segment, Range rows, float* to) const;

 private:
  AdapterView view(at::TensorList factors, int64_t rank_dim, const Segment& segment) const;

  const Update& update_;
  Segments segments_;
  at::Tensor scaling_;
  Dtype x_, y_;
  Dropout dropout_;
  float keep_scale_;
  bool any_number_;
};

// Rows of one segment; work in multiply-adds.
struct RowPiece {
  const Segment* segment;
  Range rows;
  int64_t work;
};
// The pieces of all segments; the work for one row is `columns` times the rank.
std::vector<RowPiece> pieces_of_rows(const Groups& groups, int64_t columns);

// Columns of one product of a segment: of dB, a product with dY, or of dA, a product with X,
// together with the expand onto dX.
struct ColumnPiece {
  const Segment* segment;
  bool over_x;
  Range columns;
  int64_t work;
};
// total: the work for the columns of all segments.
void add_columns(std::vector<ColumnPiece>& pieces, const Segment& segment, bool over_x,
                 int64_t columns, int64_t total);
int64_t work_of_column(const Segment& segment);

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
    few_ = segment.count <= few_rows && (view.col_pitch == 1 || view.rank_pitch == 1);
    if (!is_new(segment, view, kernels) || few_) return;
    panel_ = scratch_.of(kernels.shrink_panel_bytes(view.rank, view.cols));
    kernels.pack_shrink(view, panel_);
  }
  void for_expand(const Segment& segment, const AdapterView& view, const SkinnyKernels& kernels,
                  int64_t few_rows) {
    few_ = segment.count <= few_rows && (view.col_pitch == 1 || view.rank_pitch == 1);
    if (!is_new(segment, view, kernels) || few_) return;
    pack_expand();
  }

  // Some columns of a factor, for the expand together with wgrad: packed in every call.
  void for_columns(const AdapterView& view, const SkinnyKernels& kernels) {
    kernels_ = &kernels, view_ = view, few_ = false, packed_ = nullptr;
    pack_expand();
  }

  const AdapterView& view() const { return view_; }
  bool is_half() const { return view_.dtype == Dtype::kBFloat16; }
  const void* panel() const { return panel_; }

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
  bool is_new(const Segment& segment, const AdapterView& view, const SkinnyKernels& kernels) {
    kernels_ = &kernels, view_ = view;
    const bool is_new = packed_ != &segment;
    packed_ = &segment;
    return is_new;
  }

  const Segment* packed_ = nullptr;
  const SkinnyKernels* kernels_ = nullptr;
  AdapterView view_{};
  bool few_ = false;
  Scratch scratch_;
  void* panel_ = nullptr;
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
