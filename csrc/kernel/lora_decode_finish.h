// From partial sums to S, T and Y.
//
// Of each block of 16 x 8, lane l holds rows l / 4 and l / 4 + 8 (of W or A), and of the batch rows
// 2 (l % 4) and the next. Partial sums lie as lanes hold them.
#pragma once
#include "kernel/halves.h"
#include "kernel/lora_decode_table.h"
#include "kernel/lora_decode_work.h"
#include "kernel/rounded.h"
#include "ptx/mma.h"

namespace lora_ext::kernel {

// F is the factors' type, float or T.
template <class T, class F, class Tile>
struct LoraDecodeFinish {
  static constexpr bool kSplit = std::is_same_v<F, float>;
  using Accumulators = float[Tile::kBlocks][4];
  using Work = LoraDecodeWork<T, Tile>;

  const LoraDecodeParams<T>& p;
  const LoraDecodeTable<Tile>& table;
  const Work work;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;

  __device__ __forceinline__ static void clear(Accumulators& acc) {
#pragma unroll
    for (int i = 0; i < Tile::kBlocks * 4; ++i) acc[i / 4][i % 4] = 0.f;
  }

  __device__ __forceinline__ float4* part(float* sums, int64_t slot) const {
    return reinterpret_cast<float4*>(sums + slot * Tile::kElements) + warp * Tile::kBlocks * 32 +
           lane;
  }
  __device__ __forceinline__ void keep(float* sums, int64_t slot, const Accumulators& acc) const {
    float4* to = part(sums, slot);
#pragma unroll
    for (int j = 0; j < Tile::kBlocks; ++j)
      to[j * 32] = float4{acc[j][0], acc[j][1], acc[j][2], acc[j][3]};
  }
  // The sum of `count` parts in one order, in slots one after the other. Loads of some are in
  // flight together: each by itself would take a round trip through L2.
  __device__ __forceinline__ void add_all(float* sums, int64_t slot, int count,
                                          Accumulators& acc) const {
    constexpr int kTogether = 8 / Tile::kBlocks > 1 ? 8 / Tile::kBlocks : 1;
    clear(acc);
    for (int first = 0; first < count; first += kTogether) {
      float4 parts[kTogether][Tile::kBlocks];
#pragma unroll
      for (int i = 0; i < kTogether; ++i) {
        const float4* from = part(sums, slot + first + i);
        if (first + i >= count) break;
#pragma unroll
        for (int j = 0; j < Tile::kBlocks; ++j) parts[i][j] = from[j * 32];
      }
#pragma unroll
      for (int i = 0; i < kTogether; ++i) {
        if (first + i >= count) break;
#pragma unroll
        for (int j = 0; j < Tile::kBlocks; ++j) {
          const float4& sum = parts[i][j];
          acc[j][0] += sum.x, acc[j][1] += sum.y, acc[j][2] += sum.z, acc[j][3] += sum.w;
        }
      }
    }
  }

  // The row of the batch in a lane's element.
  __device__ __forceinline__ int row_of(int j, int e) const { return j * 8 + lane % 4 * 2 + e % 2; }

  // Whether the 16 rows that this warp has of a tile of S are any adapter's.
  __device__ __forceinline__ int s_block(int tile) const { return tile * Tile::kWarps + warp; }
  __device__ __forceinline__ bool has_s(int tile) const { return s_block(tile) < table.row_blocks; }

  // S and T of a tile of S. Columns of T past the rank, of its last 16, become zero.
  __device__ __forceinline__ void finish_s(int tile) const {
    if (!has_s(tile)) return;
    Accumulators acc;
    add_all(p.s_sums, work.s_slot(tile, 0), work.chunks, acc);
    const LoraDecodeAdapter& own = table.adapter_of_block(s_block(tile));
    // One of the table's few. NOLINTNEXTLINE(custom-cut-to-32-bits)
    const int number = static_cast<int>(&own - table.adapters);
    const float scaling = p.scalings != nullptr ? p.scalings[own.adapter] : p.scaling;
    const int rank0 = (s_block(tile) - own.first_block) * (kSplit ? 8 : 16) + lane / 4;
#pragma unroll
    for (int j = 0; j < Tile::kBlocks; ++j) {
#pragma unroll
      for (int e = 0; e < (kSplit ? 2 : 4); ++e) {
        const int row = row_of(j, e), rank = rank0 + e / 2 * 8;
        if (table.number_of[row] != number) continue;
        const float sum =
            kSplit ? acc[j][e] + acc[j][e + 2 * kSplit] * (1.f / kLoScale<T>) : acc[j][e];
        const bool inside = rank < own.rank;
        if (inside && p.s != nullptr) p.s[static_cast<int64_t>(row) * p.most_rank + rank] = sum;
        const float value = inside ? scaling * sum : 0.f;
        T* t = p.t + static_cast<int64_t>(row) * p.t_pitch + rank;
        t[0] = high_half<T>(value);
        if constexpr (kSplit) t[p.width] = low_half<T>(value);
      }
    }
  }

  // Two neighbouring elements of a row of B as halves, hi or lo.
  __device__ __forceinline__ uint32_t factor_pair(const LoraGroupedEntry& entry, int rank, int row,
                                                  int column, bool lo) const {
    T halves[2];
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      halves[i] = T(0.f);
      if (row < p.n && column + i < rank) {
        const F value = static_cast<const F*>(entry.b)[row * entry.b_pitch + column + i];
        if constexpr (kSplit) {
          halves[i] = lo ? low_half<T>(value) : high_half<T>(value);
        } else {
          halves[i] = value;
        }
      }
    }
    uint32_t pair;
    memcpy(&pair, halves, sizeof pair);
    return pair;
  }
  __device__ __forceinline__ void load_factor(uint32_t (&a)[4], const LoraGroupedEntry& entry,
                                              int rank, int row, int column, bool lo) const {
#pragma unroll
    for (int i = 0; i < 4; ++i)
      a[i] = factor_pair(entry, rank, row + i % 2 * 8, column + i / 2 * 8, lo);
  }
  // Of the rows that take the adapter; the others' T may have no such columns.
  __device__ __forceinline__ void load_t(uint32_t (&b)[2], int j, int number, int column) const {
    const int row = j * 8 + lane / 4;
    b[0] = b[1] = 0;
    if (table.number_of[row] != number) return;
    const T* t = p.t + static_cast<int64_t>(row) * p.t_pitch + column;
    b[0] = *reinterpret_cast<const uint32_t*>(t);
    b[1] = *reinterpret_cast<const uint32_t*>(t + 8);
  }

  // B hi T hi, or, of what is kept kLoScale times as large, B hi T lo and B lo T hi.
  __device__ __forceinline__ void multiply(Accumulators& low, const LoraDecodeAdapter& own,
                                           int number, int row, bool with_lo) const {
    LoraGroupedEntry entry = entry_of_factors(own.adapter);
    for (int column = 0; column < own.rank; column += 16) {
      const int at = column + lane % 4 * 2;
      uint32_t hi[4];
      [[maybe_unused]] uint32_t lo[4];
      load_factor(hi, entry, own.rank, row, at, false);
      if constexpr (kSplit) load_factor(lo, entry, own.rank, row, at, true);
#pragma unroll
      for (int j = 0; j < Tile::kBlocks; ++j) {
        if ((own.of_batch >> j & 1) == 0) continue;
        uint32_t t[2];
        if constexpr (kSplit) {
          if (with_lo) {
            load_t(t, j, number, at + p.width);
            ptx::mma_m16n8k16<T>(low[j], hi, t);
            load_t(t, j, number, at);
            ptx::mma_m16n8k16<T>(low[j], lo, t);
            continue;
          }
        }
        load_t(t, j, number, at);
        ptx::mma_m16n8k16<T>(low[j], hi, t);
      }
    }
  }
  __device__ __forceinline__ LoraGroupedEntry entry_of_factors(int adapter) const {
    if (p.factors.entries != nullptr) return p.factors.entries[adapter];
    return {static_cast<F*>(p.factors.a) + adapter * p.factors.a_stride,
            static_cast<F*>(p.factors.b) + adapter * p.factors.b_stride, p.factors.a_pitch,
            p.factors.b_pitch, 0};
  }

  // T B^T of one adapter after the other, each in sums of its own that reach its rows alone: NaN in
  // one adapter is nothing to the rows of another.
  __device__ __forceinline__ void add_low_rank(Accumulators& acc, int row) const {
    for (int number = 0; number < table.count; ++number) {
      const LoraDecodeAdapter& own = table.adapters[number];
      Accumulators low;
      clear(low);
      if constexpr (kSplit) {
        multiply(low, own, number, row, true);
#pragma unroll
        for (int i = 0; i < Tile::kBlocks * 4; ++i) low[i / 4][i % 4] *= 1.f / kLoScale<T>;
      }
      multiply(low, own, number, row, false);
#pragma unroll
      for (int j = 0; j < Tile::kBlocks; ++j) {
#pragma unroll
        for (int e = 0; e < 4; ++e)
          if (table.number_of[row_of(j, e)] == number) acc[j][e] += low[j][e];
      }
    }
  }

  __device__ __forceinline__ float bias_of(int row) const {
    if (p.bias == nullptr || row >= p.n) return 0.f;
    return p.float_bias ? static_cast<const float*>(p.bias)[row]
                        : static_cast<float>(static_cast<const T*>(p.bias)[row]);
  }

  // A tile of Y, all of whose parts and S have come.
  __device__ __forceinline__ void finish_y(int tile) const {
    Accumulators acc;
    const int first = work.first_block(tile), count = work.last_block(tile) - first + 1;
    add_all(p.sums, work.slot(tile, first), count, acc);
    const int row0 = tile * Tile::kRows + warp * 16 + lane / 4;
    add_low_rank(acc, row0);
    const float bias[2] = {bias_of(row0), bias_of(row0 + 8)};
#pragma unroll
    for (int j = 0; j < Tile::kBlocks; ++j) {
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        const int row = row_of(j, e), column = row0 + e / 2 * 8;
        if (row < p.m && column < p.n) {
          p.y[static_cast<int64_t>(row) * p.y_pitch + column] = rounded<T>(acc[j][e] + bias[e / 2]);
        }
      }
    }
  }
};

}  // namespace lora_ext::kernel
