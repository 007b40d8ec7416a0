// lora_experts_factors: writes one adapter's factors of all experts, in PEFT's layout, as pools of
// halves (lora_experts.h), which the kernels of many adapters read; for few rows it makes S and T
// instead of A's pool.
//
// In lora_b the expert is the fastest index, in its pool the rank: a block turns a tile of
// kExperts x kRows x kRanks in shared memory, reads 32 neighbouring experts by a warp and writes 32
// bytes of a row of the pool or more. A warp writes a row of the tile, and reads 2 chunks of ranks
// of 8 rows of 2 experts: both from 32 banks, by the steps below.
#pragma once
#include "common/host_device.h"
#include "kernels/experts/chunk.h"
#include "kernels/lora_experts.h"
#include "kernels/tile/expert_rows.h"
#include "ptx/thread.h"

namespace lora_ext::kernel {

template <class T>
struct ExpertsFactors {
  static constexpr int kThreads = 256, kWarps = kThreads / 32;
  static constexpr int kExperts = 32, kRows = kWarps, kRanks = 16;
  static constexpr int kRowStep = kExperts + 2, kRankStep = kRows * kRowStep + 2;
  static constexpr uint32_t kSharedBytes = kRanks * kRankStep * sizeof(float);
  static constexpr int kChunk = RowChunk<T>::kElements, kColumns = 32 * kChunk;

  const ExpertsFactorsParams& p;
  const int thread = static_cast<int>(threadIdx.x), lane = thread % 32, warp = thread / 32;

  static LORA_EXT_HOST_DEVICE unsigned parts_of(int count, unsigned size) {
    return (static_cast<unsigned>(count) + size - 1) / size;
  }

  __device__ __forceinline__ int in_pool(int expert) const { return expert * p.groups + p.group; }

  using Numbers = float[kChunk];

  template <class F>
  __device__ __forceinline__ static void load(const void* factor, int64_t at, int left,
                                              Numbers& numbers) {
    RowChunk<F> chunk;
    chunk.load(static_cast<const F*>(factor) + at, left);
#pragma unroll
    for (int i = 0; i < kChunk; ++i) numbers[i] = static_cast<float>(chunk.of[i]);
  }

  __device__ __forceinline__ void load_a(int64_t at, int left, Numbers& numbers) const {
    p.a_in_float ? load<float>(p.lora_a, at, left, numbers) : load<T>(p.lora_a, at, left, numbers);
  }

  // A chunk of each term; that of lo is `step` elements behind that of hi.
  __device__ __forceinline__ void store(const Numbers& numbers, T* to, int64_t step,
                                        int left) const {
    RowChunk<T> hi, lo;
#pragma unroll
    for (int i = 0; i < kChunk; ++i) {
      hi.of[i] = high_half<T>(numbers[i]);
      lo.of[i] = low_half<T>(numbers[i], hi.of[i]);
    }
    hi.store(to, left);
    if (p.terms == 2) lo.store(to + step, left);
  }

  // A warp: kColumns of a rank of an expert.
  __device__ __forceinline__ void copy_a() const {
    const unsigned part = blockIdx.x * kWarps + warp, segments = parts_of(p.in, kColumns);
    const auto row = static_cast<int>(part / segments), expert = row / p.ranks;
    const int rank = row % p.ranks;
    const int column = static_cast<int>(part % segments) * kColumns + lane * kChunk;
    if (expert >= p.experts || column >= p.in || !has_rows(p.offs, in_pool(expert))) return;
    const int left = p.in - column;
    const int64_t at = (int64_t{expert} * p.rank + rank) * p.in + column;
    Numbers numbers{};
    if (rank < p.rank) load_a(at, left, numbers);
    const int64_t rows = int64_t{in_pool(expert)} * p.terms * p.width + p.first + rank;
    store(numbers, static_cast<T*>(p.pool_a) + rows * p.in + column, int64_t{p.width} * p.in, left);
  }

  // A warp: a rank of a position. Positions of no expert are left out.
  __device__ __forceinline__ void multiply_a() const {
    const unsigned part = blockIdx.x * kWarps + warp;
    const auto position = static_cast<int>(part / p.ranks), rank = static_cast<int>(part % p.ranks);
    if (position >= p.offs[p.experts - 1] || rank >= p.rank) return;
    const int64_t row = p.x_rows != nullptr ? p.x_rows[position] : position;
    const T* x = static_cast<const T*>(p.x) + row * p.x_pitch;
    const int64_t a = (int64_t{expert_of(p.offs, p.experts, position)} * p.rank + rank) * p.in;
    float sum = 0.f;
    for (int column = lane * kChunk; column < p.in; column += kColumns) {
      Numbers numbers;
      RowChunk<T> of_x;
      load_a(a + column, p.in - column, numbers), of_x.load(x + column, p.in - column);
#pragma unroll
      for (int i = 0; i < kChunk; ++i) sum = fmaf(numbers[i], static_cast<float>(of_x.of[i]), sum);
    }
    sum = sum_of_warp(sum);
    if (lane != 0) return;
    p.s[int64_t{position} * p.s_pitch + p.first + rank] = sum;
    T* t = static_cast<T*>(p.t) + int64_t{position} * p.terms * p.width + p.first + rank;
    t[0] = high_half<T>(p.t_scale * sum);
    if (p.terms == 2) t[p.width] = low_half<T>(p.t_scale * sum);
  }

  // A block: a tile of kExperts, kRows and kRanks.
  __device__ __forceinline__ void turn_b() const {
    const unsigned of_experts = parts_of(p.experts, kExperts), of_ranks = parts_of(p.ranks, kRanks);
    const auto expert0 = static_cast<int>(blockIdx.x % of_experts) * kExperts;
    const auto rank0 = static_cast<int>(blockIdx.x / of_experts % of_ranks) * kRanks;
    const auto row0 = static_cast<int>(blockIdx.x / of_experts / of_ranks) * kRows;
    if (row0 >= p.out) return;
    auto* tile = reinterpret_cast<float*>(ptx::dynamic_shared_memory());
    load_tile(tile + warp * kRowStep + lane, expert0 + lane, row0 + warp, rank0);
    __syncthreads();
    constexpr int kChunks = kRanks / kChunk;
#pragma unroll
    for (int i = 0; i < kExperts * kRows * kChunks / kThreads; ++i) {
      const int index = i * kThreads + thread, rank = index % kChunks * kChunk;
      const int row = index / kChunks % kRows, expert = index / kChunks / kRows;
      store_chunk(tile + rank * kRankStep + row * kRowStep + expert, expert0 + expert, row0 + row,
                  rank0 + rank);
    }
  }

  __device__ __forceinline__ void load_tile(float* to, int expert, int row, int rank) const {
    const bool inside = expert < p.experts && row < p.out && has_rows(p.offs, in_pool(expert));
    const int64_t first = (int64_t{row} * p.rank + rank) * p.experts + expert;
    float numbers[kRanks];  // all loads before the first store
#pragma unroll
    for (int i = 0; i < kRanks; ++i) {
      const int64_t at = first + int64_t{i} * p.experts;
      numbers[i] = 0.f;
      if (!inside || rank + i >= p.rank) continue;
      numbers[i] = p.b_in_float ? static_cast<const float*>(p.lora_b)[at]
                                : static_cast<float>(static_cast<const T*>(p.lora_b)[at]);
    }
#pragma unroll
    for (int i = 0; i < kRanks; ++i) to[i * kRankStep] = p.scale * numbers[i];
  }

  __device__ __forceinline__ void store_chunk(const float* tile, int expert, int row,
                                              int rank) const {
    if (expert >= p.experts || row >= p.out || rank >= p.ranks ||
        !has_rows(p.offs, in_pool(expert)))
      return;
    Numbers numbers;
#pragma unroll
    for (int i = 0; i < kChunk; ++i) numbers[i] = tile[i * kRankStep];
    T* pool =
        static_cast<T*>(p.pool_b) + (int64_t{in_pool(expert)} * p.out + row) * p.terms * p.width;
    store(numbers, pool + p.first + rank, p.width, p.ranks - rank);
  }
};

// Grid: (blocks, 2), the second for lora_b.
template <class T>
__global__ void __launch_bounds__(ExpertsFactors<T>::kThreads)
    lora_experts_factors(const __grid_constant__ ExpertsFactorsParams p) {
  const ExpertsFactors<T> factors{p};
  if (blockIdx.y == 1) return factors.turn_b();
  p.x != nullptr ? factors.multiply_a() : factors.copy_a();
}

}  // namespace lora_ext::kernel
