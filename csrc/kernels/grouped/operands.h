// What the kernels of many adapters read of one: its rank, its rows, its entry, and tiles of its
// factors as halves.
#pragma once
#include "kernels/lora_grouped.h"
#include "kernels/tile/copy.h"
#include "kernels/tile/factor_chunk.h"
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

// The row at a position of a piece, by one of LoraGroupedPlaces' tables; past the last one `none`.
__device__ __forceinline__ int row_in_piece(const int* rows, const LoraGroupedPiece& piece,
                                            int position, int none) {
  if (position >= piece.count) return none;
  const int at = piece.begin + position;
  return rows == nullptr ? at : rows[at];
}

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
// along the rank from `lo_from` on, lo.
template <class T, class F, bool kRankInside, int kThreads>
struct FactorTile {
  static constexpr bool kSplit = std::is_same_v<F, float>;
  static constexpr int kOfChunk = Element<T>::kChunk;
  const F* data;
  int64_t pitch;
  int rank, depth;
  int lo_from;  // of floats: a multiple of kOfChunk, or above all ranks

  // Whether rows begin at multiples of 16 bytes.
  __device__ __forceinline__ bool in_chunks() const {
    const auto bytes = static_cast<uintptr_t>(pitch * static_cast<int64_t>(sizeof(F)));
    return (reinterpret_cast<uintptr_t>(data) | bytes) % 16 == 0;
  }

  // Where the factor has the chunk of the tile that begins at a row and column.
  __device__ __forceinline__ FactorPlace<F> place_of(int row, int column, bool whole) const {
    bool lo = false;
    if constexpr (kSplit) {
      int& at_rank = kRankInside ? column : row;
      lo = at_rank >= lo_from;
      if (lo) at_rank -= lo_from;
    }
    const int rows = kRankInside ? depth : rank, columns = kRankInside ? rank : depth;
    return {data + row * pitch + column, row < rows ? columns - column : 0, whole, lo};
  }

  // Copies kRows x kColumns from (first_row, first_column) on, in the panels of tile/copy.h. Of
  // floats, kFloatChunks of a thread are in flight at once: as many as there are registers for.
  template <int kRows, int kColumns, int kFloatChunks = 2>
  __device__ __forceinline__ void copy(uint32_t shared, uint32_t tile, int first_row,
                                       int first_column) const {
    constexpr int kRowChunks = kColumns / kOfChunk, kAll = kRows * kRowChunks;
    constexpr int kTogether = kSplit ? kFloatChunks : 1;
    static_assert(kColumns % 64 == 0 && kAll % (kTogether * kThreads) == 0);
    const bool whole = in_chunks();
#pragma unroll 1
    for (int index = static_cast<int>(threadIdx.x); index < kAll; index += kTogether * kThreads) {
      uint32_t to[kTogether];
      FactorPlace<F> places[kTogether];
#pragma unroll
      for (int i = 0; i < kTogether; ++i) {
        const int at = index + i * kThreads, in_tile = at / kRowChunks, chunk = at % kRowChunks;
        to[i] = tile + panel_chunk_offset<kRows>(in_tile, chunk);
        places[i] = place_of(first_row + in_tile, first_column + chunk * kOfChunk, whole);
      }
      copy_factor_chunks<T>(shared, to, places);
    }
  }
};

}  // namespace lora_ext::kernel
