// The operands of a launch with many adapters besides x and the base: factors, scalings, and which
// rows each adapter has. On the host only the addresses of index, offs, ranks and scaling are used.
#pragma once

#include <vector>

#include "common/call.h"
#include "kernels/lora_grouped.h"

namespace lora_ext::kernel_launch {

// Factors or gradients, and the tensors that keep their memory alive until the launch. After that,
// memory that is freed is not used again on the stream before the kernels have ended.
class GroupedMatrices {
 public:
  // `a` and `b` are lists or pools, as in `update`; an undefined tensor is a gradient that was not
  // requested.
  GroupedMatrices(const Update& update, at::TensorList a, at::TensorList b);

  const kernel::LoraGroupedMatrices& matrices() const { return matrices_; }

 private:
  kernel::LoraGroupedMatrices matrices_{};
  at::Tensor ranks_;
  std::vector<kernel::LoraGroupedEntry> entries_;
};

class GroupedOperands {
 public:
  explicit GroupedOperands(const Update& update);

  // Fills in the operands of a call with this number of rows.
  void set(kernel::LoraGroupedOperands& operands, int64_t rows) const;

 private:
  int64_t adapters_, rank_;
  at::Tensor scaling_, index_, offs_;  // contiguous
  Factors a_, b_;                      // unit stride within a row
  GroupedMatrices factors_;
};

}  // namespace lora_ext::kernel_launch
