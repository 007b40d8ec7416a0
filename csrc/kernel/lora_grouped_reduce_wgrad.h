// lora_grouped_reduce_wgrad: completes the gradients that lora_grouped_wgrad leaves as partial
// sums.
//
//     dA_g = scale * sum of its partial sums    if g's rows are more than one piece     [rank, K]
//     dB_g = scale * sum of its partial sums                                            [N, rank]
//     0                                         if g has no rows; in a pool also past its rank
#pragma once
#include "kernel/lora_grouped_operands.h"
#include "kernel/sum_of_splits.h"

namespace lora_ext::kernel {

struct LoraGroupedReduceGradient {
  const float* partial;  // [slots, most_rank, c]
  int c;                 // 0 if the gradient is not wanted
  float scale;
};

struct LoraGroupedReduceWgradParams {
  LoraGroupedReduceGradient gradient[2];  // dA, dB: one for each blockIdx.z
  LoraGroupedFactors gradients, factors;
  const LoraGroupedSum* sums;
  int most_rank;
};

// Grid: adapters, blocks for the elements of a gradient, gradients. Neighbouring threads are
// neighbours in memory: along c for dA, along the rank for dB.
template <class T, class F>
__global__ void __launch_bounds__(256)
    lora_grouped_reduce_wgrad(const __grid_constant__ LoraGroupedReduceWgradParams p) {
  const int adapter = static_cast<int>(blockIdx.x);
  const bool of_b = blockIdx.z == 1;
  const LoraGroupedReduceGradient& what = p.gradient[of_b];
  const LoraGroupedSum sum = p.sums[adapter];
  const LoraGroupedEntry to = entry_of<F>(p.gradients, adapter);
  const int rank = rank_of(p.factors, adapter, p.most_rank);
  const int end = p.gradients.entries == nullptr ? p.most_rank : rank;
  const int first = sum.pieces == 1 ? rank : 0, ranks = end - first;  // one piece: complete
  const int64_t count = static_cast<int64_t>(ranks) * what.c;
  const int64_t step = static_cast<int64_t>(gridDim.y) * blockDim.x;
  for (int64_t i = static_cast<int64_t>(blockIdx.y) * blockDim.x + threadIdx.x; i < count;
       i += step) {
    const int64_t column = first + (of_b ? i % ranks : i / what.c);
    const int64_t c = of_b ? i / ranks : i % what.c;
    float value = 0.f;
    if (column < rank) {
      const int64_t size = static_cast<int64_t>(p.most_rank) * what.c;
      value = what.scale * sum_of_splits<T>(what.partial + sum.slot * size + column * what.c + c,
                                            sum.pieces, size, 1, 0);
    }
    F* element = of_b ? static_cast<F*>(to.b) + c * to.b_pitch + column
                      : static_cast<F*>(to.a) + column * to.a_pitch + c;
    if constexpr (std::is_same_v<F, float>) {
      *element = value;
    } else {
      *element = rounded<F>(value);
    }
  }
}

}  // namespace lora_ext::kernel
