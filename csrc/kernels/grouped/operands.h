// What the kernels of many adapters read of one: its rank, its rows, its entry, and tiles of its
// factors as halves.
#pragma once
#include "kernels/lora_grouped.h"
#include "kernels/tile/copy.h"
#include "kernels/tile/halves.h"
#include "ptx/target.h"

namespace lora_ext::kernel {

// Ranks are clamped to 0..max_rank.
__device__ __forceinline__ int clamped_rank(int rank, int max_rank) {
  return min(max(rank, 0), max_rank);
}

__device__ __forceinline__ int rank_of(const LoraGroupedFactors& factors, int adapter,
                                       int max_rank) {
  return clamped_rank(
      factors.entries != nullptr ? factors.entries[adapter].rank : factors.ranks[adapter],
      max_rank);
}

// Rows of X, Y or their gradients in the order of their adapters, by position; past the last
// position there is none.
struct PositionedRows {
  static constexpr bool kInOrder = false;
  const int* order;  // as in LoraGroupedTables
  int m;
  __device__ __forceinline__ int operator()(int position) const {
    return order == nullptr || position >= m ? position : order[position];
  }
};

// Columns of Z or T for a rank, and for each half if a factor is in floats: whole chunks.
__device__ __forceinline__ int whole_chunks(int rank) { return (rank + 7) / 8 * 8; }

// The entry of an adapter whose factors have elements F.
template <class F>
__device__ __forceinline__ LoraGroupedEntry entry_of(const LoraGroupedFactors& factors,
                                                     int adapter) {
  if (factors.entries != nullptr) return factors.entries[adapter];
  return {static_cast<F*>(factors.a) + adapter * factors.a_stride,
          static_cast<F*>(factors.b) + adapter * factors.b_stride, factors.a_pitch, factors.b_pitch,
          factors.ranks[adapter]};
}

// Tiles of A [rank, depth] or B [depth, rank] of one adapter as halves of T; floats as hi and,
// along the rank from `lo_from` on, lo. Copied in 16-byte chunks, asynchronously where the chunks
// of T are aligned.
template <class T, class F, bool kRankInside, int kThreads>
struct FactorTile {
  static constexpr bool kSplit = std::is_same_v<F, float>;
  static constexpr int kOfChunk = Element<T>::kChunk;
  const F* data;
  int64_t pitch;
  int rank, depth;
  int lo_from;

  __device__ __forceinline__ bool in_chunks() const {
    const auto bytes = static_cast<uintptr_t>(pitch * static_cast<int64_t>(sizeof(T)));
    return !kSplit && (reinterpret_cast<uintptr_t>(data) | bytes) % 16 == 0;
  }

  __device__ __forceinline__ T half_at(int at_rank, int across) const {
    const bool lo = at_rank >= lo_from;
    const int of_rank = lo ? at_rank - lo_from : at_rank;
    if (of_rank >= rank || across >= depth) return T(0.f);
    const int64_t row = kRankInside ? across : of_rank;
    const F value = data[row * pitch + (kRankInside ? of_rank : across)];
    if constexpr (kSplit) {
      return lo ? low_half<T>(value) : high_half<T>(value);
    } else {
      return value;
    }
  }

  // Copies kRows x kColumns from (first_row, first_column) on, in the panels of tile/copy.h.
  template <int kRows, int kColumns>
  __device__ __forceinline__ void copy(uint32_t shared, uint32_t tile, int first_row,
                                       int first_column) const {
    constexpr int kRowChunks = kColumns / kOfChunk, kAll = kRows * kRowChunks;
    static_assert(kColumns % 64 == 0 && kAll % kThreads == 0);
    const bool whole = in_chunks();
    const int rows = kRankInside ? depth : rank, columns = kRankInside ? rank : depth;
#pragma unroll 1
    for (int index = static_cast<int>(threadIdx.x); index < kAll; index += kThreads) {
      const int in_tile = index / kRowChunks, chunk = index % kRowChunks;
      const int row = first_row + in_tile, column = first_column + chunk * kOfChunk;
      const uint32_t to = tile + panel_chunk_offset<kRows>(in_tile, chunk);
      if (whole) {
        const int left = row < rows ? min(max(columns - column, 0), kOfChunk) : 0;
        ptx::cp_async_16(shared + to, data + row * pitch + column,
                         static_cast<uint32_t>(left) * sizeof(T));
      } else {
        T* halves = reinterpret_cast<T*>(ptx::dynamic_shared_memory() + to);
#pragma unroll
        for (int e = 0; e < kOfChunk; ++e)
          halves[e] = kRankInside ? half_at(column + e, row) : half_at(row, column + e);
      }
    }
  }
};

}  // namespace lora_ext::kernel
