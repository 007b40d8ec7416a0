// lora_split: writes matrices as halves that the kernels can copy in 16-byte chunks.
//
//     hi + lo / kLoScale = scale * M        [rows, width] each, zero past M's columns
//
// It splits fp32 adapters and S. A half adapter whose rows are not whole chunks (r not a multiple
// of 8) is copied to a pitch that is.
#pragma once

#include <cstdint>

#include "kernels/tile/halves.h"
#include "ptx/target.h"

namespace lora_ext::kernel {

template <class T>
struct LoraSplitMatrix {
  const void* m;  // [rows, columns]; float, or T
  T* halves[2];   // [rows, width], hi and lo; lo may be null
  int64_t row_stride, column_stride, pitch;
  int rows, columns, width;
  bool in_float;
  float scale;
};

constexpr int kMaxSplitMatrices = 3;

template <class T>
struct LoraSplitParams {
  LoraSplitMatrix<T> matrix[kMaxSplitMatrices];  // one per blockIdx.y
};

// One thread per element.
template <class T>
__global__ void __launch_bounds__(256) lora_split(const __grid_constant__ LoraSplitParams<T> p) {
  const LoraSplitMatrix<T>& what = p.matrix[blockIdx.y];
  const int64_t count = static_cast<int64_t>(what.rows) * what.width;
  const int64_t step = static_cast<int64_t>(gridDim.x) * blockDim.x;
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x; i < count;
       i += step) {
    const int64_t row = i / what.width, column = i % what.width;
    float value = 0.f;
    if (column < what.columns) {
      const int64_t at = row * what.row_stride + column * what.column_stride;
      if (what.in_float) {
        value = what.scale * static_cast<const float*>(what.m)[at];
      } else {
        value = what.scale * static_cast<float>(static_cast<const T*>(what.m)[at]);
      }
    }
    what.halves[0][row * what.pitch + column] = high_half<T>(value);
    if (what.halves[1] != nullptr) what.halves[1][row * what.pitch + column] = low_half<T>(value);
  }
}

}  // namespace lora_ext::kernel
