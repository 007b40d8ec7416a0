// Dropout on CUDA: parameters and launcher, free of torch.
#pragma once

#include <cstdint>
#include <string>

#include "common/dtype.h"

namespace lora_ext::cuda {

struct DropoutParams {
  const void* x;  // [rows, cols], row pitch x_pitch elements; not read for the mask
  void* out;      // [rows, cols], row pitch out_pitch elements
  int64_t rows, cols;
  int64_t x_pitch, out_pitch;
  const int64_t* seed;  // one element on the device: a graph replay reads the new value
  int64_t row_offset, col_offset;
  const int64_t* mask_rows;  // on the device: row m has the mask's row mask_rows[m]; or null
  uint32_t keep_count;
  double keep_scale;
};

// out = kept ? keep_scale * x : 0, or with kBool the mask itself; x and out may be the same.
// Asynchronous on `stream` of the current device. Returns "" or the error of the launch.
std::string launch_dropout(Dtype dtype, const DropoutParams& params, void* stream);

}  // namespace lora_ext::cuda
