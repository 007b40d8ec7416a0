// lora_experts_sum and lora_experts_dot: what a token's slots add up to, and the gradients of their
// weights (lora_experts.h). Bound by memory: every row is read once. All sums are in one order,
// whatever the alignment.
#pragma once
#include "kernels/experts/chunk.h"
#include "kernels/lora_experts.h"
#include "kernels/tile/expert_rows.h"

namespace lora_ext::kernel {

constexpr int kExpertsThreads = 256;

template <class T>
struct ExpertsSum {
  static constexpr int kChunk = RowChunk<T>::kElements;
  static constexpr int kTogether = 4;  // rows that are loaded before the first is added

  const ExpertsSumParams& p;

  // A thread: a chunk of a token's columns.
  __device__ __forceinline__ void add(int64_t token, int column) const {
    const T* rows = static_cast<const T*>(p.rows) + column;
    float sum[kChunk] = {};
    // Between loads of unlike kinds there would be branches, and one load at a time under way.
    if (p.pitch % kChunk == 0 && RowChunk<T>::is_whole(rows, p.n - column)) {
      add_slots<true>(token, rows, kChunk, sum);
    } else {
      add_slots<false>(token, rows, p.n - column, sum);
    }
    RowChunk<T> out;
#pragma unroll
    for (int e = 0; e < kChunk; ++e) out.of[e] = rounded<T>(sum[e]);
    out.store(static_cast<T*>(p.out) + token * p.n + column, p.n - column);
  }

  template <bool kWhole>
  __device__ __forceinline__ void add_slots(int64_t token, const T* rows, int left,
                                            float (&sum)[kChunk]) const {
    for (int slot = 0; slot < p.slots; slot += kTogether)
      add_rows<kWhole>(token * p.slots + slot, p.slots - slot, rows, left, sum);
  }

  // Of the slots from `first` on, `slots` of which are the token's.
  template <bool kWhole>
  __device__ __forceinline__ void add_rows(int64_t first, int slots, const T* rows, int left,
                                           float (&sum)[kChunk]) const {
    const int count = *p.count;
    int positions[kTogether];
    float weights[kTogether];
    RowChunk<T> chunks[kTogether];
#pragma unroll
    for (int i = 0; i < kTogether; ++i) positions[i] = i < slots ? p.place[first + i] : count;
#pragma unroll
    for (int i = 0; i < kTogether; ++i) {
      if (positions[i] >= count) continue;
      const T* row = rows + positions[i] * p.pitch;
      if constexpr (kWhole) {
        chunks[i].load_whole(row);
      } else {
        chunks[i].load_part(row, left);
      }
    }
#pragma unroll
    for (int i = 0; i < kTogether; ++i) {
      weights[i] = 1.f;
      if (positions[i] < count && p.weights != nullptr)
        weights[i] = weight_at<T>(p.weights, p.weights_in_float, first + i);
    }
#pragma unroll
    for (int i = 0; i < kTogether; ++i) {
      if (positions[i] >= count) continue;
#pragma unroll
      for (int e = 0; e < kChunk; ++e)
        sum[e] = fmaf(weights[i], static_cast<float>(chunks[i].of[e]), sum[e]);
    }
  }
};

// Grid: (tokens, columns).
template <class T>
__global__ void __launch_bounds__(kExpertsThreads)
    lora_experts_sum(const __grid_constant__ ExpertsSumParams p) {
  const auto chunk = static_cast<int>(blockIdx.y * kExpertsThreads + threadIdx.x);
  const int column = chunk * RowChunk<T>::kElements;
  if (column < p.n) ExpertsSum<T>{p}.add(blockIdx.x, column);
}

template <class T>
struct ExpertsDot {
  static constexpr int kChunk = RowChunk<T>::kElements, kColumns = 32 * kChunk;

  const ExpertsDotParams& p;
  const int lane = static_cast<int>(threadIdx.x) % 32;

  // A warp: a row.
  __device__ __forceinline__ void row(int64_t position) const {
    const int64_t slot = p.perm[position];
    float sum = 0.f;
    if (position < p.offs[p.experts - 1]) {
      scale_row(position, weight_at<T>(p.weights, p.weights_in_float, slot), sum);
      if (p.bias != nullptr) add_bias(slot / p.slots, expert_of(p.offs, p.experts, position), sum);
    }
    sum = sum_of_warp(sum);
    if (lane != 0) return;
    if (p.weights_in_float) {
      static_cast<float*>(p.dweights)[slot] = sum;
    } else {
      static_cast<T*>(p.dweights)[slot] = rounded<T>(sum);
    }
  }

 private:
  // Adds the products of two chunks, and leaves the second in `of_b`.
  __device__ __forceinline__ static void add(const T* a, const T* b, int left, RowChunk<T>& of_b,
                                             float& sum) {
    using Chunk = RowChunk<T>;
    Chunk of_a;
    if (Chunk::is_whole(a, left) && Chunk::is_whole(b, left)) {
      of_a.load_whole(a), of_b.load_whole(b);
    } else {
      of_a.load_part(a, left), of_b.load_part(b, left);
    }
#pragma unroll
    for (int e = 0; e < kChunk; ++e)
      sum = fmaf(static_cast<float>(of_a.of[e]), static_cast<float>(of_b.of[e]), sum);
  }

  __device__ __forceinline__ void scale_row(int64_t position, float weight, float& sum) const {
    const T* x = static_cast<const T*>(p.x) + position * p.x_pitch;
    T* dx = static_cast<T*>(p.dx) + position * p.dx_pitch;
    for (int column = lane * kChunk; column < p.n; column += kColumns) {
      RowChunk<T> of_dx;
      add(x + column, dx + column, p.n - column, of_dx, sum);
#pragma unroll
      for (T& number : of_dx.of) number = rounded<T>(weight * static_cast<float>(number));
      of_dx.store(dx + column, p.n - column);
    }
  }

  __device__ __forceinline__ void add_bias(int64_t token, int64_t expert, float& sum) const {
    const T* grad = static_cast<const T*>(p.grad) + token * p.grad_pitch;
    const T* bias = static_cast<const T*>(p.bias) + expert * p.bias_pitch;
    RowChunk<T> of_bias;
    for (int column = lane * kChunk; column < p.bias_n; column += kColumns)
      add(grad + column, bias + column, p.bias_n - column, of_bias, sum);
  }
};

// A warp of the grid for each row.
template <class T>
__global__ void __launch_bounds__(kExpertsThreads)
    lora_experts_dot(const __grid_constant__ ExpertsDotParams p) {
  const int64_t warp = (int64_t{blockIdx.x} * kExpertsThreads + threadIdx.x) / 32;
  if (warp < p.rows) ExpertsDot<T>{p}.row(warp);
}

}  // namespace lora_ext::kernel
