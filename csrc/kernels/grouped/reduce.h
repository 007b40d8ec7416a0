// lora_grouped_reduce: sums the splits of lora_grouped_shrink, in one fixed order.
//
//     S = keep_scale * sum of Z     over splits, hi + lo / kLoScale    [m, max_rank], by row
//     T = s_g S                     in X's type, as hi and lo          [m, width] each, by position
//
// Or T alone from a saved S. Only the columns of a row's own rank are read and written.
#pragma once
#include "kernels/grouped/operands.h"
#include "kernels/tile/halves.h"

namespace lora_ext::kernel {

template <class T>
struct LoraGroupedReduceParams {
  const float* z;        // [splits, m, z_pitch], by position; null if S is given
  float* s;              // [m, max_rank], written; may be null
  const float* saved;    // [m, max_rank]; may be null
  const float* scaling;  // [groups]
  T* t[2];               // [m, t_pitch], hi and lo; lo may be null
  int64_t t_pitch;
  int m, splits, terms, z_pitch, max_rank;
  float keep_scale;
  LoraGroupedFactors factors;
  const LoraGroupedPiece* tiles;
  const int* order;
};

// One block per tile of positions, one thread per element of T.
template <class T>
__global__ void __launch_bounds__(256)
    lora_grouped_reduce(const __grid_constant__ LoraGroupedReduceParams<T> p) {
  const LoraGroupedPiece piece = p.tiles[blockIdx.x];
  const int rank = rank_of(p.factors, piece.adapter, p.max_rank), width = whole_chunks(rank);
  for (int i = static_cast<int>(threadIdx.x); i < piece.count * rank; i += 256) {
    const int at = piece.begin + i / rank, row = PositionedRows{p.order, p.m}(at);
    const int64_t position = at, column = i % rank;
    const int64_t in_s = static_cast<int64_t>(row) * p.max_rank + column;
    float s = 0.f;
    if (p.saved != nullptr) {
      s = p.saved[in_s];
    } else {
      s = p.keep_scale * sum_of_splits<T>(p.z + position * p.z_pitch + column, p.splits,
                                          static_cast<int64_t>(p.m) * p.z_pitch, p.terms, width);
      if (p.s != nullptr) p.s[in_s] = s;
    }
    const float t = p.scaling[piece.adapter] * s;
    p.t[0][position * p.t_pitch + column] = high_half<T>(t);
    if (p.t[1] != nullptr) p.t[1][position * p.t_pitch + column] = low_half<T>(t);
  }
}

// lora_grouped_reduce_wgrad: completes the gradients that lora_grouped_wgrad leaves as partial
// sums.
//
//     dA_g = scale * sum of its partial sums    if g's rows are more than one piece     [rank, K]
//     dB_g = scale * sum of its partial sums                                            [N, rank]
//     0                                         if g has no rows; in a pool also past its rank

struct LoraGroupedReduceGradient {
  const float* partial;  // [slots, max_rank, c]
  int c;                 // 0 if the gradient is not wanted
  float scale;
};

struct LoraGroupedReduceWgradParams {
  LoraGroupedReduceGradient gradient[2];  // dA, dB: one for each blockIdx.z
  LoraGroupedFactors gradients, factors;
  const LoraGroupedSum* sums;
  int max_rank;
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
  const int rank = rank_of(p.factors, adapter, p.max_rank);
  const int end = p.gradients.entries == nullptr ? p.max_rank : rank;
  const int first = sum.pieces == 1 ? rank : 0, ranks = end - first;  // one piece: complete
  const int64_t count = static_cast<int64_t>(ranks) * what.c;
  const int64_t step = static_cast<int64_t>(gridDim.y) * blockDim.x;
  for (int64_t i = static_cast<int64_t>(blockIdx.y) * blockDim.x + threadIdx.x; i < count;
       i += step) {
    const int64_t column = first + (of_b ? i % ranks : i / what.c);
    const int64_t c = of_b ? i / ranks : i % what.c;
    float value = 0.f;
    if (column < rank) {
      const int64_t size = static_cast<int64_t>(p.max_rank) * what.c;
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
