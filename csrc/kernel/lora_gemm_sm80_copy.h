// From global memory into the ring of stages: which part of which operand a step needs, and how its
// 16-byte chunks get there.
//
// A stage's rows are 128 bytes = 8 chunks, and chunk c of row r is kept at position c ^ (r % 8), so
// that the eight rows of an ldmatrix lie in different banks. What lies outside a matrix is zero.
#pragma once
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "kernel/lora_gemm.h"
#include "ptx/cp_async.h"
#include "ptx/thread.h"

namespace lora_ext::kernel {

// Where the chunk lies in a K-major tile: rows of 64 elements along k.
__device__ __forceinline__ uint32_t row_chunk_offset(int row, int chunk) {
  return static_cast<uint32_t>(row * 128 + (chunk ^ row % 8) * 16);
}
// And in an MN-major tile: panels of 64 columns, each with 64 rows, which are k.
__device__ __forceinline__ uint32_t panel_chunk_offset(int row, int chunk) {
  return static_cast<uint32_t>(chunk / 8 * 64 * 128) + row_chunk_offset(row, chunk % 8);
}

template <class T, class Tile, bool kMNMajor, Alignment kAlignment, class Fault>
struct LoraGemmCopy {
  struct Matrix {
    const T* data;
    int64_t pitch;
    int rows, columns;
  };

  const int m, n;
  const uint32_t shared;

  // Brings the 8 elements from `column` on of a row into the chunk at `offset`.
  __device__ __forceinline__ void copy_chunk(uint32_t offset, const Matrix& matrix, int row,
                                             int column) const {
    const int left =
        Fault::count("copy.columns", matrix.columns, matrix.columns - 1, matrix.columns + 1) -
        column;
    const bool inside = Fault::flag(
        "copy.inside",
        row < Fault::count("copy.rows", matrix.rows, matrix.rows - 1, matrix.rows + 1) && left > 0);
    const T* source = matrix.data + static_cast<int64_t>(row) * matrix.pitch + column;
    const int elements = Fault::flag("copy.outside", !inside)         ? 0
                         : Fault::flag("copy.whole_chunk", left >= 8) ? 8
                                                                      : left;
    if constexpr (kAlignment == Alignment::kVector) {
      ptx::cp_async_16(shared + offset, source, static_cast<uint32_t>(elements) * sizeof(T));
    } else {
      T* chunk = reinterpret_cast<T*>(ptx::dynamic_shared_memory() + offset);
#pragma unroll
      for (int i = 0; i < 8; ++i)
        chunk[i] = Fault::flag("copy.element", i < elements) ? source[i] : T(0.f);
    }
  }

  // The rows [first_row, first_row + kRows) along k from k0 on, as a K-major tile.
  template <int kRows>
  __device__ __forceinline__ void copy_rows(uint32_t tile, const Matrix& matrix, int first_row,
                                            int k0) const {
#pragma unroll
    for (int i = 0; i < kRows * 8 / Tile::kThreads; ++i) {
      const int index = static_cast<int>(threadIdx.x) + i * Tile::kThreads;
      const int row = index / 8, chunk = index % 8;
      copy_chunk(tile + row_chunk_offset(row, chunk), matrix, first_row + row, k0 + chunk * 8);
    }
  }

  // 64 rows, which are k, of the columns [first_column, first_column + kN), as an MN-major tile.
  __device__ __forceinline__ void copy_panels(uint32_t tile, const Matrix& matrix, int k0,
                                              int first_column) const {
#pragma unroll
    for (int i = 0; i < Tile::kN * 8 / Tile::kThreads; ++i) {
      const int index = static_cast<int>(threadIdx.x) + i * Tile::kThreads;
      const int row = index / (Tile::kN / 8), chunk = index % (Tile::kN / 8);
      copy_chunk(tile + panel_chunk_offset(row, chunk), matrix, k0 + row, first_column + chunk * 8);
    }
  }

  // Starts the copies of one step: 64 along k of left [m, k] and right [n, k] or [k, n].
  __device__ __forceinline__ void copy_step(int stage, const T* left, int64_t left_pitch,
                                            const T* right, int64_t right_pitch, int k, int k0,
                                            int first_row, int first_column) const {
    const uint32_t tile = static_cast<uint32_t>(stage) * Tile::kStageBytes;
    copy_rows<Tile::kM>(tile, {left, left_pitch, m, k}, first_row, k0);
    if constexpr (kMNMajor) {
      copy_panels(tile + Tile::kLeftBytes, {right, right_pitch, k, n}, k0, first_column);
    } else {
      copy_rows<Tile::kN>(tile + Tile::kLeftBytes, {right, right_pitch, n, k}, first_column, k0);
    }
  }
};

}  // namespace lora_ext::kernel
