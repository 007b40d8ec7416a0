// Which adapters the rows of a lora_decode take: a table in each block's shared memory, made from
// data on the device, so that a graph stays valid when an index, a rank or a scaling changes.
#pragma once
#include "kernels/decode/work.h"
#include "kernels/grouped/operands.h"

namespace lora_ext::kernel {

// An adapter that at least one row takes.
struct LoraDecodeAdapter {
  int adapter, rank;
  int first_block;    // index of its first block of 16 rows in the tiles of S
  uint32_t of_batch;  // bit j: a row of the j-th eight of the batch has it
};

// Number of 16-row blocks of A in the tiles of S. A rank takes whole blocks; with floats twice as
// many, each with hi of eight ranks and, below, lo of the same ranks.
__device__ __forceinline__ int decode_row_blocks(int rank, bool in_float) {
  return (rank + 15) / 16 * (1 + static_cast<int>(in_float));
}

// Pointers and pitches of an adapter's factors of type F; adapters[] has its rank.
template <class F, class T>
__device__ __forceinline__ LoraGroupedEntry decode_entry(const LoraDecodeParams<T>& p,
                                                         int adapter) {
  if (p.factors.entries != nullptr) return p.factors.entries[adapter];
  return {static_cast<F*>(p.factors.a) + adapter * p.factors.a_stride,
          static_cast<F*>(p.factors.b) + adapter * p.factors.b_stride, p.factors.a_pitch,
          p.factors.b_pitch, 0};
}

template <class Tile>
struct LoraDecodeTable {
  static constexpr int kBatch = Tile::kBatch;
  static_assert(kBatch <= Tile::kThreads);

  LoraDecodeAdapter adapters[kBatch];  // [count], in the order of their first rows
  int number_of[kBatch];               // per row, its index in adapters[]; -1 without an adapter
  int adapter_of[kBatch];              // temporary, per row: its adapter,
  int first_of[kBatch];                // the first row with the same adapter,
  int blocks_of[kBatch];               // in such a first row its 16-row blocks in tiles of S,
  int number_at[kBatch];               // and its index in adapters[]
  int count, row_blocks;
  int is_last;
  uint32_t to_finish[Tile::kWarps];  // one bit per lane

  // The adapter of a row; -1 if there is none or its rank is 0.
  template <class T>
  __device__ __forceinline__ static int adapter_at(const LoraDecodeParams<T>& p, int row) {
    if (row >= p.m) return -1;
    if (p.index == nullptr) return 0;
    const int adapter = p.index[row];
    if (adapter < 0 || adapter >= p.groups) return -1;
    return rank_at(p, adapter) > 0 ? adapter : -1;
  }
  template <class T>
  __device__ __forceinline__ static int rank_at(const LoraDecodeParams<T>& p, int adapter) {
    const bool all_alike = p.factors.entries == nullptr && p.factors.ranks == nullptr;
    return all_alike ? p.max_rank : rank_of(p.factors, adapter, p.max_rank);
  }

  // Called by all threads of the block.
  template <class T>
  __device__ __forceinline__ void make(const LoraDecodeParams<T>& p, bool in_float) {
    const int row = static_cast<int>(threadIdx.x);
    const bool has_row = row < kBatch;
    if (has_row) adapter_of[row] = adapter_at(p, row);
    __syncthreads();
    if (has_row) {
      int first = 0;
      while (adapter_of[first] != adapter_of[row]) ++first;
      const bool is_first = first == row && adapter_of[row] >= 0;
      first_of[row] = first;
      blocks_of[row] = is_first ? decode_row_blocks(rank_at(p, adapter_of[row]), in_float) : 0;
    }
    __syncthreads();
    if (has_row) assign_number(p, row);
    __syncthreads();
    // The barriers of the arrivals order this before it is read.
    if (has_row) number_of[row] = adapter_of[row] < 0 ? -1 : number_at[first_of[row]];
  }

  // Writes the adapter whose first row this is and, in the last row, the totals.
  template <class T>
  __device__ __forceinline__ void assign_number(const LoraDecodeParams<T>& p, int row) {
    int before = 0, blocks_before = 0;
    uint32_t of_batch = 0;
#pragma unroll 8
    for (int other = 0; other < kBatch; ++other) {
      if (other < row) before += blocks_of[other] > 0, blocks_before += blocks_of[other];
      if (adapter_of[other] == adapter_of[row]) of_batch |= 1u << other / 8;
    }
    if (blocks_of[row] > 0) {
      number_at[row] = before;
      adapters[before] = {adapter_of[row], rank_at(p, adapter_of[row]), blocks_before, of_batch};
    }
    if (row == kBatch - 1) {
      count = before + (blocks_of[row] > 0), row_blocks = blocks_before + blocks_of[row];
    }
  }

  // The index in adapters[] of the adapter that has a 16-row block of the tiles of S; there is one.
  __device__ __forceinline__ int number_of_block(int block) const {
    int low = 0, high = count - 1;
    while (low < high) {
      const int middle = (low + high + 1) / 2;
      if (adapters[middle].first_block <= block) {
        low = middle;
      } else {
        high = middle - 1;
      }
    }
    return low;
  }
};

}  // namespace lora_ext::kernel
