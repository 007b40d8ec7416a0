// Which adapters the rows of a lora_decode take: a table in each block's shared memory, made from
// what the device has, so that a graph stays right when an index, a rank or a scaling changes.
#pragma once
#include "kernel/lora_decode.h"
#include "kernel/lora_grouped_ranks.h"

namespace lora_ext::kernel {

// An adapter that some row takes.
struct LoraDecodeAdapter {
  int adapter, rank;
  int first_block;    // its first 16 rows in the tiles of S
  uint32_t of_batch;  // which eights of the batch have a row of it
};

// Blocks of 16 rows of A in tiles of S: a rank takes whole ones, and of floats twice as many, each
// with hi of eight ranks and, below, lo of the same.
__device__ __forceinline__ int decode_row_blocks(int rank, bool in_float) {
  return (rank + 15) / 16 * (1 + static_cast<int>(in_float));
}

// Where an adapter's factors, of F, lie; of its rank adapters[] tells.
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
  int number_of[kBatch];               // of each row's, among them; -1 without one
  int adapter_of[kBatch];              // while the table is made: by itself,
  int first_of[kBatch];                // the first row that has it,
  int blocks_of[kBatch];               // and in such a row its blocks in tiles of S
  int number_at[kBatch];               // its number there
  int count, row_blocks;
  int is_last;
  uint32_t to_finish[Tile::kWarps];  // bits of a warp's lanes

  // A row's adapter, if that has a rank.
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
    return all_alike ? p.most_rank : rank_of(p.factors, adapter, p.most_rank);
  }

  // By all threads of the block.
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
    if (has_row) number(p, row);
    __syncthreads();
    // Read behind the barriers of parts that come.
    if (has_row) number_of[row] = adapter_of[row] < 0 ? -1 : number_at[first_of[row]];
  }

  // The adapter whose first row this is, and, in the last row, how much there is in all.
  template <class T>
  __device__ __forceinline__ void number(const LoraDecodeParams<T>& p, int row) {
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

  // Among adapters[], the one that has a block of 16 rows in the tiles of S; there is one.
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
