// The copies of one thread for an operand of lora_gemm, step after step along k: the same chunks of
// each tile. Addresses and limits are computed where a product begins, and advance with the steps.
#pragma once
#include "kernel/tile_copy_sm80.h"

namespace lora_ext::kernel {

// For rows in their original order: position = row of P and Y.
struct SameRows {
  static constexpr bool kInOrder = true;
  __device__ __forceinline__ int operator()(int position) const { return position; }
};

// Tiles of kRows x kColumns, one after the other along the rows of a matrix (kAlongRows) or down
// its columns. A thread's chunks are one below the other, kApart rows apart.
template <class T, int kThreads, int kRows, int kColumns, bool kAlongRows, class Rows = SameRows>
struct StepCopy {
  using Chunk = ChunkCopy<T, Alignment::kVector>;
  struct Matrix {
    const T* data;
    int64_t pitch;
    int rows, columns;
  };

  static constexpr int kRowChunks = kColumns / 8, kApart = kThreads / kRowChunks;
  static constexpr int kCopies = kRows / kApart;
  static_assert(kThreads % kRowChunks == 0 && kRows % kApart == 0);
  static_assert(kApart % 8 == 0,
                "chunks of one column of a panel, in which all lie swizzled alike");
  static_assert(kAlongRows || Rows::kInOrder);

  const Chunk chunk;
  const int row_in_tile = static_cast<int>(threadIdx.x) / kRowChunks;
  const int chunk_in_row = static_cast<int>(threadIdx.x) % kRowChunks;
  // Offset of the first chunk, in a tile of panels (tile_copy_sm80.h).
  const uint32_t in_tile = panel_chunk_offset<kRows>(row_in_tile, chunk_in_row);

  const T* source = nullptr;  // the first chunk of this step
  int64_t apart = 0;          // elements from one chunk to the next, or of a row, if not in order
  int rows = 0, columns = 0;  // of the matrix, from the first chunk on
  int position = 0;           // of the first chunk's row
  int row_at[Rows::kInOrder ? 1 : kCopies] = {};  // rows that are not in order

  // Begins at (first_row, first_column).
  __device__ __forceinline__ void begin(const Matrix& matrix, int first_row, int first_column,
                                        const Rows& row_of) {
    const int column = first_column + chunk_in_row * 8;
    position = first_row + row_in_tile;
    rows = matrix.rows - position, columns = matrix.columns - column;
    if constexpr (Rows::kInOrder) {
      source = matrix.data + (static_cast<int64_t>(position) * matrix.pitch + column);
      apart = kApart * matrix.pitch;
    } else {
      source = matrix.data + column, apart = matrix.pitch;
#pragma unroll
      for (int i = 0; i < kCopies; ++i) row_at[i] = row_of(position + i * kApart);
    }
  }

  // Copies the thread's i-th chunk of the step.
  __device__ __forceinline__ void copy(uint32_t tile, int i) {
    const int elements = i * kApart < rows ? min(max(columns, 0), 8) : 0;
    const uint32_t to = tile + in_tile + static_cast<uint32_t>(i * kApart) * 128;
    if constexpr (Rows::kInOrder) {
      chunk.copy(to, source + i * apart, elements);
    } else {
      chunk.copy(to, source + row_at[i] * apart, elements);
    }
  }
  __device__ __forceinline__ void copy_all(uint32_t tile) {
#pragma unroll
    for (int i = 0; i < kCopies; ++i) copy(tile, i);
  }

  __device__ __forceinline__ void advance() {
    if constexpr (kAlongRows) {
      source += kColumns, columns -= kColumns;
    } else {
      source += kCopies * apart, rows -= kRows;
    }
  }
};

}  // namespace lora_ext::kernel
