// lora_decode, second half: from partial sums to S, T and Y.
//
// Partial sums are stored in the accumulators' lane layout (kernels/decode/low_rank.h).
#pragma once
#include "kernels/decode/low_rank.h"
#include "kernels/decode/work.h"
#include "kernels/tile/halves.h"

namespace lora_ext::kernel {

// F is the type of the factors, float or T.
template <class T, class F, class Tile>
struct LoraDecodeFinish {
  static constexpr bool kSplit = std::is_same_v<F, float>;
  using LowRank = LoraDecodeLowRank<T, F, Tile>;
  using Accumulators = typename LowRank::Accumulators;
  using Work = LoraDecodeWork<T, Tile>;

  const LoraDecodeParams<T>& p;
  const LoraDecodeTable<Tile>& table;
  const Work work;
  const LowRank low_rank{p, table};
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;

  __device__ __forceinline__ float4* part(float* sums, int slot) const {
    return reinterpret_cast<float4*>(sums + int64_t{slot} * Tile::kElements) +
           warp * Tile::kBlocks * 32 + lane;
  }
  __device__ __forceinline__ void store_partial(float* sums, int slot,
                                                const Accumulators& acc) const {
    float4* to = part(sums, slot);
#pragma unroll
    for (int j = 0; j < Tile::kBlocks; ++j)
      to[j * 32] = float4{acc[j][0], acc[j][1], acc[j][2], acc[j][3]};
  }
  // Sums `count` partial sums from consecutive slots, in a fixed order. Several loads are in flight
  // at once: one by one, each would take a round trip through L2.
  __device__ __forceinline__ void add_all(float* sums, int slot, int count,
                                          Accumulators& acc) const {
    constexpr int kTogether = 8 / Tile::kBlocks > 1 ? 8 / Tile::kBlocks : 1;
    LowRank::clear(acc);
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

  // The 16 rows of this warp in a tile of S, and whether they hold any rank of an adapter.
  __device__ __forceinline__ int s_block(int tile) const { return tile * Tile::kWarps + warp; }
  __device__ __forceinline__ bool has_s(int tile) const { return s_block(tile) < table.row_blocks; }

  // Computes S and T of a tile of S from its partial sums, which begin at `slot`. Columns of T past
  // the rank, up to a multiple of 16, become zero.
  __device__ __forceinline__ void finish_s(int tile, int slot, int count) const {
    if (!has_s(tile)) return;
    Accumulators acc;
    add_all(p.s_sums, slot, count, acc);
    const int number = table.number_of_block(s_block(tile));
    const LoraDecodeAdapter& own = table.adapters[number];
    const float scaling = p.scalings != nullptr ? p.scalings[own.adapter] : p.scaling;
    const int rank0 = (s_block(tile) - own.first_block) * (kSplit ? 8 : 16) + lane / 4;
#pragma unroll
    for (int j = 0; j < Tile::kBlocks; ++j) {
#pragma unroll
      for (int e = 0; e < (kSplit ? 2 : 4); ++e) {
        const int row = low_rank.row_of(j, e), rank = rank0 + e / 2 * 8;
        if (table.number_of[row] != number) continue;
        const float sum =
            kSplit ? acc[j][e] + acc[j][e + 2 * kSplit] * (1.f / kLoScale<T>) : acc[j][e];
        const bool inside = rank < own.rank;
        if (inside && p.s != nullptr) p.s[static_cast<int64_t>(row) * p.max_rank + rank] = sum;
        const float value = inside ? scaling * sum : 0.f;
        T* t = p.t + static_cast<int64_t>(row) * p.t_pitch + rank;
        t[0] = high_half<T>(value);
        if constexpr (kSplit) t[p.width] = low_half<T>(value);
      }
    }
  }

  __device__ __forceinline__ float bias_of(int row) const {
    if (p.bias == nullptr || row >= p.n) return 0.f;
    return p.float_bias ? static_cast<const float*>(p.bias)[row]
                        : static_cast<float>(static_cast<const T*>(p.bias)[row]);
  }

  // Finishes a tile of Y; all of its partial sums and S are complete.
  __device__ __forceinline__ void finish_y(int tile) const {
    Accumulators acc;
    const int first = work.shares.first_block(tile);
    add_all(p.sums, tile + first, work.shares.last_block(tile) - first + 1, acc);
    const int row0 = tile * Tile::kRows + warp * 16 + lane / 4;
    low_rank.add(acc, row0);
    const float bias[2] = {bias_of(row0), bias_of(row0 + 8)};
#pragma unroll
    for (int j = 0; j < Tile::kBlocks; ++j) {
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        const int row = low_rank.row_of(j, e), column = row0 + e / 2 * 8;
        if (row < p.m && column < p.n) {
          p.y[static_cast<int64_t>(row) * p.y_pitch + column] = rounded<T>(acc[j][e] + bias[e / 2]);
        }
      }
    }
  }
};

}  // namespace lora_ext::kernel
