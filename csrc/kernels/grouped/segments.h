// lora_grouped_segments: sorts the rows by adapter, from an index or from ranges, and writes tables
// on the device (lora_grouped.h). A stable counting sort without atomics, so that it repeats bit
// for bit:
//
//     count    for each chunk of rows, how many each adapter has         only with an index
//     scan     one block: where each adapter, and each chunk of it, begins, and all tables. The
//              counts lie by adapter, and of each by chunk, so that this is one sum over all of
//              them, of many at a time, instead of a chain of loads along the chunks
//     place    each row at its position                                  only with an index
//
// The kernels do not depend on T, the type of X: they are templates so that each file of kernels
// has its own.
#pragma once
#include <climits>

#include "kernels/grouped/operands.h"
#include "kernels/lora_grouped.h"
#include "ptx/target.h"
#include "ptx/thread.h"

namespace lora_ext::kernel {

// lora_grouped_entries: writes a list of adapters that the host has as a table on the device.
// Entries are kernel parameters, so that the launch can be captured and no copy is waited for.
struct LoraGroupedEntriesParams {
  static constexpr int kMax = 96;  // per launch: 3.8 of the 4 KiB that parameters may have
  LoraGroupedEntry entries[kMax];
  LoraGroupedEntry* to;
  int count;
};

// One block, one thread per entry; entries do not depend on T.
template <class T>
__global__ void __launch_bounds__(LoraGroupedEntriesParams::kMax)
    lora_grouped_entries(const __grid_constant__ LoraGroupedEntriesParams p) {
  const int i = static_cast<int>(threadIdx.x);
  if (i < p.count) p.to[i] = p.entries[i];
}

struct LoraGroupedSegmentsParams {
  static constexpr int kThreads = 256;
  static constexpr int kChunk = kThreads;  // one thread per row of a chunk
  static constexpr uint32_t kSharedBytes = kThreads * sizeof(int);

  LoraGroupedRows rows;
  LoraGroupedFactors factors;
  LoraGroupedTables tables;
  int groups_per_weight = 1;  // used with row_tiles

  __device__ __forceinline__ int chunks() const { return (rows.m + kChunk - 1) / kChunk; }
  // In a pool without ranks every adapter has the largest. Only these kernels read a pool's own
  // ranks; the others read the copy in the tables.
  __device__ __forceinline__ int rank(int adapter) const {
    const bool all_alike = factors.entries == nullptr && factors.ranks == nullptr;
    return all_alike ? rows.max_rank : rank_of(factors, adapter, rows.max_rank);
  }
};

// A chunk of rows, one row per thread.
struct LoraGroupedChunk {
  static constexpr int kChunk = LoraGroupedSegmentsParams::kChunk;
  const LoraGroupedSegmentsParams& p;
  int* keys = reinterpret_cast<int*>(ptx::dynamic_shared_memory());
  const int thread = static_cast<int>(threadIdx.x);
  const int row = static_cast<int>(blockIdx.x) * kChunk + thread;

  // Returns the row's adapter, or `groups` without one. A row past m has a key that no row has.
  __device__ __forceinline__ int key() const {
    if (row >= p.rows.m) return -1;
    const int adapter = p.rows.index[row], groups = p.rows.groups;
    if (adapter < 0 || adapter >= groups) return groups;
    return p.rank(adapter) == 0 ? groups : adapter;
  }
  // Of this chunk's rows with a key.
  __device__ __forceinline__ int& count_of(int key) const {
    return p.tables.counts[static_cast<int64_t>(key) * p.chunks() + blockIdx.x];
  }
  // Rows of the chunk with this thread's key among the first `count`.
  __device__ __forceinline__ int count_equal(int key, int count) const {
    int found = 0;
    for (int i = 0; i < count; ++i) found += static_cast<int>(keys[i] == key);
    return found;
  }
  __device__ __forceinline__ void publish(int key) const {
    keys[thread] = key;
    __syncthreads();
  }
  // Counts the rows of each key: the last one with a key in its chunk knows their number.
  __device__ __forceinline__ void count(int key) const {
    for (int i = thread; i < p.rows.groups + 1; i += kChunk) count_of(i) = 0;
    publish(key);
    const int before = count_equal(key, thread);
    if (key >= 0 && before + 1 == count_equal(key, kChunk)) count_of(key) = before + 1;
  }
  // The row's position, where counts are those at which rows begin; -1 of a row past m.
  __device__ __forceinline__ int position(int key) const {
    publish(key);
    return key < 0 ? -1 : count_of(key) + count_equal(key, thread);
  }
};

// Grid: chunks.
template <class T>
__global__ void __launch_bounds__(LoraGroupedSegmentsParams::kThreads)
    lora_grouped_count(const __grid_constant__ LoraGroupedSegmentsParams p) {
  const LoraGroupedChunk chunk{p};
  chunk.count(chunk.key());
}

// Grid: chunks.
template <class T>
__global__ void __launch_bounds__(LoraGroupedSegmentsParams::kThreads)
    lora_grouped_place(const __grid_constant__ LoraGroupedSegmentsParams p) {
  const LoraGroupedChunk chunk{p};
  const int position = chunk.position(chunk.key());
  if (position >= 0) p.tables.order[position] = chunk.row;
}

struct LoraGroupedScan {
  static constexpr int kThreads = LoraGroupedSegmentsParams::kThreads, kWarps = kThreads / 32;
  const LoraGroupedSegmentsParams& p;
  int* of_warps = reinterpret_cast<int*>(ptx::dynamic_shared_memory());
  const int thread = static_cast<int>(threadIdx.x), lane = thread % 32, warp = thread / 32;
  const int m = p.rows.m, groups = p.rows.groups;

  static __device__ __forceinline__ int blocks_of(int count, int size) {
    return (count + size - 1) / size;
  }

  // Prefix combination: of the values of the threads before this one and of all batches before.
  // `carry` becomes that of the next batch. Values are not negative.
  template <class Together>
  __device__ __forceinline__ int exclusive_scan(int value, int& carry,
                                                const Together& together) const {
#pragma unroll
    for (int distance = 1; distance < 32; distance *= 2) {
      const int other = __shfl_up_sync(0xFFFFFFFFu, value, distance);
      if (lane >= distance) value = together(value, other);
    }
    const int inclusive = value, beside = __shfl_up_sync(0xFFFFFFFFu, value, 1);
    if (lane == 31) of_warps[warp] = inclusive;
    __syncthreads();
    int here = carry, all = carry;
    for (int i = 0; i < kWarps; ++i) {
      all = together(all, of_warps[i]);
      if (i + 1 == warp) here = all;
    }
    __syncthreads();  // before of_warps is written again
    carry = all;
    return lane == 0 ? here : together(here, beside);
  }
  __device__ __forceinline__ int exclusive_sum(int value, int& carry) const {
    return exclusive_scan(value, carry, [](int a, int b) { return a + b; });
  }
  __device__ __forceinline__ int exclusive_max(int value, int& carry) const {
    return exclusive_scan(value, carry, [](int a, int b) { return max(a, b); });
  }

  // Makes of each count the position at which its rows begin.
  __device__ __forceinline__ void begin_chunks() const {
    constexpr int kEach = 16;  // of a thread at a time: 64 adapters in 8192 rows are all at once
    const int64_t all = static_cast<int64_t>(groups + 1) * p.chunks();
    int rows = 0;
    for (int64_t first = 0; first < all; first += kThreads * kEach) {
      int* counts = p.tables.counts + first + thread * kEach;
      const int64_t left = all - first - thread * kEach;
      int of_each[kEach], sum = 0;
#pragma unroll
      for (int i = 0; i < kEach; ++i) of_each[i] = i < left ? counts[i] : 0;
#pragma unroll
      for (int i = 0; i < kEach; ++i) sum += of_each[i];
      int begin = exclusive_sum(sum, rows);
#pragma unroll
      for (int i = 0; i < kEach; ++i) {
        if (i < left) counts[i] = begin;
        begin += of_each[i];
      }
    }
    __syncthreads();  // before other threads read them
  }

  // Totals of all batches of adapters so far.
  struct Carry {
    int rows, segments, steps, tiles, row_tiles, pieces, slots, end;
  };

  // Positions [begin, end) of an adapter, or of rows without one.
  struct Range {
    int begin, end;
  };
  __device__ __forceinline__ Range range_of(int key, Carry& carry) const {
    if (p.rows.index != nullptr) {
      if (key >= groups) return {m, m};
      const int* begin = p.tables.counts + static_cast<int64_t>(key) * p.chunks();
      return {*begin, begin[p.chunks()]};  // rows without an adapter begin after the last one's
    }
    const int end = key < groups ? min(max(p.rows.ends[key], 0), m) : 0;
    const int begin = exclusive_max(end, carry.rows);
    return {begin, max(begin, end)};
  }

  // Writes pieces of at most `rows` positions each, from `to` on.
  __device__ __forceinline__ static void write_pieces(LoraGroupedPiece* to, int adapter,
                                                      const Range& range, int rows, int slot,
                                                      int step) {
    for (int begin = range.begin; begin < range.end; begin += rows) {
      *to++ = {adapter, begin, min(rows, range.end - begin), slot};
      slot += step;
    }
  }

  // The tables of a batch of adapters, one per thread.
  __device__ __forceinline__ void batch(int key, Carry& carry) const {
    const LoraGroupedTables& t = p.tables;
    const Range range = range_of(key, carry);
    const int rank = key < groups ? p.rank(key) : 0;
    const int count = rank > 0 ? range.end - range.begin : 0,
              pieces = blocks_of(count, t.piece_rows);
    const int tiles = blocks_of(count, LoraGroupedTables::kTileRows);
    constexpr int kRows = LoraGroupedTables::kRowTileRows;
    const int slots = pieces > 1 ? pieces : 0;
    const int segment = exclusive_sum(count > 0, carry.segments);
    const int steps_before = exclusive_sum(count > 0 ? blocks_of(rank, 64) : 0, carry.steps);
    const int tile = exclusive_sum(tiles, carry.tiles);
    const int row_tile =
        t.row_tiles == nullptr ? 0 : exclusive_sum(blocks_of(count, kRows), carry.row_tiles);
    const int piece = exclusive_sum(pieces, carry.pieces);
    const int slot = exclusive_sum(slots, carry.slots);
    const int end_before = exclusive_max(count > 0 ? range.end : 0, carry.end);
    if (key < groups) t.sums[key] = {pieces, slot};
    if (key < groups && t.ranks != nullptr) t.ranks[key] = rank;
    if (count == 0) return;
    t.segments[segment] = {key, range.begin, range.end, rank, steps_before};
    write_pieces(t.tiles + tile, key, range, LoraGroupedTables::kTileRows, -1, 0);
    if (t.row_tiles != nullptr)
      write_pieces(t.row_tiles + row_tile, key, range, kRows, key / p.groups_per_weight, 0);
    write_pieces(t.pieces + piece, key, range, t.piece_rows, slots > 0 ? slot : -1, 1);
    for (int i = blocks_of(end_before, kRows); i < blocks_of(range.end, kRows); ++i)
      t.first[i] = segment;
  }

  // Fills the tables past the last entry.
  __device__ __forceinline__ void finish(const Carry& carry) const {
    const LoraGroupedTables& t = p.tables;
    const auto leave_empty = [&](LoraGroupedPiece* pieces, int used, int count) {
      for (int i = used + thread; i < count; i += kThreads) pieces[i] = {0, 0, 0, -1};
    };
    leave_empty(t.tiles, carry.tiles, t.tile_count);
    leave_empty(t.pieces, carry.pieces, t.piece_count);
    constexpr int kRows = LoraGroupedTables::kRowTileRows;
    if (t.row_tiles != nullptr) {
      const int without = blocks_of(m - carry.end, kRows);
      for (int i = thread; i < without; i += kThreads) {
        const int begin = carry.end + i * kRows;
        t.row_tiles[carry.row_tiles + i] = {-1, begin, min(kRows, m - begin), -1};
      }
      leave_empty(t.row_tiles, carry.row_tiles + without, t.row_tile_count);
    }
    for (int i = blocks_of(carry.end, kRows) + thread; i < blocks_of(m, kRows) + 1; i += kThreads)
      t.first[i] = carry.segments;
    if (thread == 0) t.segments[carry.segments] = {-1, INT_MAX, INT_MAX, 0, carry.steps};
  }

  __device__ __forceinline__ void run() const {
    Carry carry{};
    for (int first = 0; first < groups; first += kThreads) batch(first + thread, carry);
    finish(carry);
  }
};

// Grid: one block.
template <class T>
__global__ void __launch_bounds__(LoraGroupedSegmentsParams::kThreads)
    lora_grouped_scan(const __grid_constant__ LoraGroupedSegmentsParams p) {
  const LoraGroupedScan scan{p};
  if (p.rows.index != nullptr) scan.begin_chunks();
  scan.run();
}

}  // namespace lora_ext::kernel
