// Parts of a launch: pitches, alignment, the mask, the workspace, the stream, errors; the operands
// of many adapters; and the counters of lora_decode.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/core/Device.h>

#include <cstdint>
#include <string>
#include <vector>

#include "common/call.h"
#include "kernels/lora_grouped.h"
#include "kernels/lora_linear.h"

namespace lora_ext::kernel_launch {

// The row pitch. A tensor of one row may have any stride: the result is then a multiple of a chunk.
int64_t pitch_of(const at::Tensor& tensor);
// Whether the rows of a tensor can be copied in 16-byte chunks, and by a tensor map, which does not
// support rows that overlap.
bool aligned(const at::Tensor& tensor);
// The first matrix of a stack, or its transpose if that has unit stride within a row.
at::Tensor first_matrix(const at::Tensor& stack);
// Whether all of them are aligned, and rows of one matrix with fewer than 2^31.
bool aligned_stack(const at::Tensor& stack);
// The same for a result [rows, columns] from torch's allocator, which aligns it.
bool aligned_rows(int64_t columns, Dtype dtype);

kernel::Mask mask_of(const DropoutArgs& dropout);

// The current stream of a CUDA device; nullptr for other devices, which occur in tests.
void* stream_of(const at::Device& device);
// The index of a CUDA device; if it has none, that of the current device.
int index_of(const at::Device& device);

// Throws LaunchError, or OutOfMemoryError, unless the error is empty.
void check_launch(const std::string& error, const at::Device& device);

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

// The operands of a launch with many adapters besides x and the base: factors, scalings, and which
// rows each adapter has. On the host only the addresses of index, offs, ranks and scaling are used.
class GroupedOperands {
 public:
  explicit GroupedOperands(const Update& update);

  // Fills in the operands of a call with this number of rows.
  void set(kernel::LoraGroupedOperands& operands, int64_t rows) const;

 private:
  int64_t adapters_, rank_;
  float one_scaling_;
  at::Tensor scaling_, index_, offs_;  // contiguous
  Factors a_, b_;                      // unit stride within a row
  GroupedMatrices factors_;
};

// The counters of lora_decode on the device. They are zero when a launch begins and are left at
// zero, so that a call needs no extra launch to clear them.
//
// `count` counters for one launch on the current stream. Calls on one stream run one after the
// other and share their counters. A launch that is captured gets counters of its own permanently,
// since replays of different graphs may run concurrently. Returns nullptr if there are none: the
// counters are then in the call's workspace and are cleared before the launch.
uint32_t* decode_counts(const at::Device& device, int64_t count);

}  // namespace lora_ext::kernel_launch
