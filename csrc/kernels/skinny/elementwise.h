// The elementwise kernels around the products of one adapter: lora_split before them, lora_reduce
// and lora_reduce_wgrad after them.
#pragma once
#include <cstdint>

#include "kernels/tile/halves.h"
#include "ptx/sync.h"
#include "ptx/target.h"

namespace lora_ext::kernel {

// lora_split: writes matrices as halves that the kernels can copy in 16-byte chunks.
//
//     hi + lo / kLoScale = scale * M        [rows, width] each, zero past M's columns
//
// It splits fp32 adapters and S. A half adapter whose rows are not whole chunks (r not a multiple
// of 8) is copied to a pitch that is.
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
  const LoraSplitMatrix<T>& matrix = p.matrix[blockIdx.y];
  const int64_t count = static_cast<int64_t>(matrix.rows) * matrix.width;
  const int64_t step = static_cast<int64_t>(gridDim.x) * blockDim.x;
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x; i < count;
       i += step) {
    const int64_t row = i / matrix.width, column = i % matrix.width;
    float value = 0.f;
    if (column < matrix.columns) {
      const int64_t at = row * matrix.row_stride + column * matrix.column_stride;
      if (matrix.in_float) {
        value = matrix.scale * static_cast<const float*>(matrix.m)[at];
      } else {
        value = matrix.scale * static_cast<float>(static_cast<const T*>(matrix.m)[at]);
      }
    }
    matrix.halves[0][row * matrix.pitch + column] = high_half<T>(value);
    if (matrix.halves[1] != nullptr)
      matrix.halves[1][row * matrix.pitch + column] = low_half<T>(value);
  }
}

// lora_reduce: sums the splits of a skinny product, in one fixed order.
//
//     S = keep_scale * sum of Z         over splits, hi + lo / kLoScale   [m, rank]
//     T = scaling * S                   in X's type, as hi and lo         [m, width] each
template <class T>
struct LoraReduceParams {
  const float*
      z;     // [splits, m, z_pitch]: the rank's columns, with two terms lo's from lo_column on
  float* s;  // [m, rank]; may be null
  T* t[2];   // [m, width], hi and lo; lo may be null
  int64_t t_pitch;
  int m, rank, splits, terms;
  int z_pitch, lo_column;
  int width;  // >= rank; T's columns past the rank become zero
  float keep_scale, scaling;
};

// One thread per element of T. lora_gemm may start at once (PDL): it waits before it reads T.
template <class T>
__global__ void __launch_bounds__(256) lora_reduce(const __grid_constant__ LoraReduceParams<T> p) {
  if (threadIdx.x == 0) {  // for the block; the fence passes on what the grids before wrote
    ptx::fence_acq_rel_gpu();
    ptx::griddepcontrol_launch_dependents();
  }
  const int64_t count = static_cast<int64_t>(p.m) * p.width;
  const int64_t step = static_cast<int64_t>(gridDim.x) * blockDim.x;
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x; i < count;
       i += step) {
    const int64_t row = i / p.width, column = i % p.width;
    float t = 0.f;
    if (column < p.rank) {
      const float s = p.keep_scale * sum_of_splits<T>(p.z + row * p.z_pitch + column, p.splits,
                                                      static_cast<int64_t>(p.m) * p.z_pitch,
                                                      p.terms, p.lo_column);
      if (p.s != nullptr) p.s[row * p.rank + column] = s;
      t = p.scaling * s;
    }
    p.t[0][row * p.t_pitch + column] = high_half<T>(t);
    if (p.t[1] != nullptr) p.t[1][row * p.t_pitch + column] = low_half<T>(t);
  }
}

// lora_reduce_wgrad: sums the splits of lora_wgrad and lora_dsdb into the gradients of A and B.
//
//     dA = scale * sum of G^T       over splits, hi + lo / kLoScale      [rank, K]
//     dB = scale * sum of G                                              [N, rank]
struct LoraReduceGradient {
  const float* g;  // [splits, g_columns, c]; with two terms lo's columns begin at lo_column
  void* gradient;  // [rank, c], or [c, rank] if transposed; float, or the kernel's T
  int c, rank, splits, terms;
  int g_columns, lo_column;
  bool transposed, in_float;
  float scale;
};

struct LoraReduceWgradParams {
  LoraReduceGradient gradient[2];  // one per blockIdx.y
};

// One thread per element, neighbouring threads along c.
template <class T>
__global__ void __launch_bounds__(256)
    lora_reduce_wgrad(const __grid_constant__ LoraReduceWgradParams p) {
  const LoraReduceGradient& sum = p.gradient[blockIdx.y];
  const int64_t count = static_cast<int64_t>(sum.rank) * sum.c;
  const int64_t step = static_cast<int64_t>(gridDim.x) * blockDim.x;
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x; i < count;
       i += step) {
    const int64_t column = i / sum.c, c = i % sum.c;
    const float value =
        sum.scale * sum_of_splits<T>(sum.g + i, sum.splits,
                                     static_cast<int64_t>(sum.g_columns) * sum.c, sum.terms,
                                     static_cast<int64_t>(sum.lo_column) * sum.c);
    const int64_t at = sum.transposed ? c * sum.rank + column : i;
    if (sum.in_float) {
      static_cast<float*>(sum.gradient)[at] = value;
    } else {
      static_cast<T*>(sum.gradient)[at] = rounded<T>(value);
    }
  }
}

}  // namespace lora_ext::kernel
