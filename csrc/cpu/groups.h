// A call with many adapters, prepared for the skinny passes: the rows, factors and sums of each
// segment, and how the work is cut into pieces for threads.
#pragma once

#include <vector>

#include "common/segments.h"
#include "cpu/skinny.h"

namespace lora_ext::cpu {

class Groups {
 public:
  Groups(const Update& update, Segments segments, at::ScalarType x, at::ScalarType y);

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
  // The mask for those rows, from `column` on.
  Dropout dropout_at(const Rows& rows, int64_t column) const;

  // The passes take S and dS of a segment as dense [rows, rank]. dS, a temporary, is stored this
  // way. S is [M, max rank] with the rows in the order of x, so a segment's part may or may not be
  // dense.
  static float* ds_of(const at::Tensor& ds, const Segment& segment, int64_t row) {
    return ds.mutable_data_ptr<float>() + segment.begin * ds.size(1) + row * segment.rank;
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

}  // namespace lora_ext::cpu
