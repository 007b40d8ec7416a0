// A factor of one adapter for the passes of one thread: packed once for consecutive pieces of a
// segment, or in its original layout if the segment has few rows.
#pragma once

#include <ATen/ops/empty.h>

#include "common/segments.h"
#include "cpu/skinny.h"

namespace lora_ext::cpu {

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

class Factor {
 public:
  void for_shrink(const Segment& segment, const AdapterView& view, const SkinnyKernels& kernels) {
    few_ = segment.count <= kernels.few_rows && (view.col_pitch == 1 || view.rank_pitch == 1);
    if (!is_new(segment, view, kernels) || few_) return;
    panel_ = scratch_.of(kernels.shrink_panel_bytes(view.rank, view.cols));
    kernels.pack_shrink(view, panel_);
  }
  void for_expand(const Segment& segment, const AdapterView& view, const SkinnyKernels& kernels) {
    few_ = segment.count <= kernels.few_rows && (view.col_pitch == 1 || view.rank_pitch == 1);
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
