// Copies from global memory into tiles of shared memory, in 16-byte chunks.
//
// A tile is one or more panels side by side, each with rows of kChunks chunks. The chunks of a row
// are swizzled, so that the eight rows of an ldmatrix are in different banks. Elements outside of
// the matrix become zero.
#pragma once
#include <cuda.h>
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>
#include <type_traits>

#include "ptx/memory.h"
#include "ptx/thread.h"

namespace lora_ext::kernel {

// What copies know of the type of their elements. There are no others than these.
template <class T, CUtensorMapDataType kType>
struct ElementOf {
  static constexpr int kBytes = sizeof(T);
  static constexpr int kChunk = 16 / kBytes;  // elements of a chunk
  static constexpr CUtensorMapDataType kTensorMap = kType;
};

template <class T>
struct Element;
template <>
struct Element<__nv_bfloat16> : ElementOf<__nv_bfloat16, CU_TENSOR_MAP_DATA_TYPE_BFLOAT16> {};
template <>
struct Element<__half> : ElementOf<__half, CU_TENSOR_MAP_DATA_TYPE_FLOAT16> {};

// What a kernel may assume about addresses, pitches and boundaries.
enum class Alignment {
  kVector,   // all pointers to 16-bit elements and all pitches are multiples of 16 bytes
  kElement,  // nothing: loads and stores are single elements
};
// Calls run(std::integral_constant<Alignment, ...>()).
template <class Run>
void with_alignment(bool vector, const Run& run) {
  vector ? run(std::integral_constant<Alignment, Alignment::kVector>())
         : run(std::integral_constant<Alignment, Alignment::kElement>());
}

// Offset of a chunk in a panel. Eight rows of 16-byte chunks c must fall into the eight different
// 16-byte columns of the 128 bytes of all banks: rows of 8 chunks use c ^ row; shorter rows change
// the swizzle after as many rows as share those 128 bytes.
template <int kChunks = 8>
__device__ __forceinline__ uint32_t row_chunk_offset(int row, int chunk) {
  static_assert(kChunks == 2 || kChunks == 4 || kChunks == 8);
  return static_cast<uint32_t>(row * kChunks + (chunk ^ row / (8 / kChunks) % kChunks)) * 16;
}
// Offset of a chunk in a tile of panels with kRows rows of 8 chunks each.
template <int kRows>
__device__ __forceinline__ uint32_t panel_chunk_offset(int row, int chunk) {
  return static_cast<uint32_t>(chunk / 8 * kRows * 128) + row_chunk_offset(row, chunk % 8);
}

// Copies one chunk, of which `elements` from `source` on are inside; if 0, nothing is read.
template <class T, Alignment kAlignment>
struct ChunkCopy {
  static constexpr int kOfChunk = Element<T>::kChunk;

  const uint32_t shared;

  __device__ __forceinline__ void copy(uint32_t to, const T* source, int elements) const {
    if constexpr (kAlignment == Alignment::kVector) {
      ptx::cp_async_16(shared + to, source, static_cast<uint32_t>(elements) * sizeof(T));
    } else {
      T* chunk = reinterpret_cast<T*>(ptx::dynamic_shared_memory() + to);
#pragma unroll
      for (int i = 0; i < kOfChunk; ++i) chunk[i] = i < elements ? source[i] : T(0.f);
    }
  }
};

template <class T, int kThreads, Alignment kAlignment>
struct TileCopy {
  struct Matrix {
    const T* data;
    int64_t pitch;
    int rows, columns;
  };
  static constexpr int kOfChunk = Element<T>::kChunk;

  const uint32_t shared;

  // Copies a chunk's elements of a row from `column` on into the chunk at `to`.
  __device__ __forceinline__ void copy_chunk(uint32_t to, const Matrix& matrix, int row,
                                             int column) const {
    const int left = matrix.columns - column;
    const bool inside = row < matrix.rows && left > 0;
    const int64_t offset = static_cast<int64_t>(row) * matrix.pitch + column;
    const T* source = matrix.data + offset;
    const int elements = !inside ? 0 : min(left, kOfChunk);
    ChunkCopy<T, kAlignment>{shared}.copy(to, source, elements);
  }

  // Copies rows [first_row, first_row + kRows), columns [first_column, first_column + kColumns),
  // into panels of kChunks chunks per row. If a tile has fewer chunks than threads, the first
  // threads copy one each, and the others must not call.
  template <int kRows, int kColumns, int kChunks = 8>
  __device__ __forceinline__ void copy_tile(uint32_t tile, const Matrix& matrix, int first_row,
                                            int first_column) const {
    copy_rows<kRows, kColumns, kChunks>(tile, matrix, first_column,
                                        [&](int row) { return first_row + row; });
  }

  // The same for gathered rows: row_of(row of the tile) is the row of the matrix.
  template <int kRows, int kColumns, int kChunks = 8, class RowOf>
  __device__ __forceinline__ void copy_rows(uint32_t tile, const Matrix& matrix, int first_column,
                                            const RowOf& row_of) const {
    constexpr int kRowChunks = kColumns / kOfChunk, kAll = kRows * kRowChunks;
    static_assert(kRowChunks % kChunks == 0);
    static_assert(kAll % kThreads == 0 || kAll < kThreads);
    constexpr int kCopies = (kAll + kThreads - 1) / kThreads;
    // Element-wise, the code of one chunk is large: unrolled, the kernels would spill.
    [[maybe_unused]] constexpr int kUnrolled = kAlignment == Alignment::kVector ? kCopies : 1;
#pragma unroll kUnrolled
    for (int i = 0; i < kCopies; ++i) {
      const int index = static_cast<int>(threadIdx.x) + i * kThreads;
      const int row = index / kRowChunks, chunk = index % kRowChunks;
      const auto panel = static_cast<uint32_t>(chunk / kChunks * kRows * kChunks * 16);
      copy_chunk(tile + panel + row_chunk_offset<kChunks>(row, chunk % kChunks), matrix,
                 row_of(row), first_column + chunk * kOfChunk);
    }
  }
};

}  // namespace lora_ext::kernel
