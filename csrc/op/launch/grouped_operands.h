// What a launch with many adapters reads beside x and the base: factors, scalings, and which rows
// each adapter has. Of index, offs, ranks and scaling only the addresses are read.
#pragma once

#include <vector>

#include "common/call.h"
#include "kernel/lora_grouped_linear.h"

namespace lora_ext::kernel_launch {

// Factors or gradients, and what keeps their memory until the launch: on the stream, freed memory
// is not used again before the kernels have ended.
class GroupedMatrices {
 public:
  // `a` and `b` are lists or pools, as in `update`; an undefined tensor is a gradient that is not
  // wanted.
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

  // Of a call with so many rows.
  void set(kernel::LoraGroupedOperands& operands, int64_t rows) const;

 private:
  int64_t adapters_, rank_;
  at::Tensor scaling_, index_, offs_;  // contiguous
  Factors a_, b_;                      // rows of unit stride
  GroupedMatrices factors_;
};

}  // namespace lora_ext::kernel_launch
