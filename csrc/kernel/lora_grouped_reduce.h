// lora_grouped_reduce: sums the splits of lora_grouped_shrink, in one fixed order.
//
//     S = keep_scale * sum of Z     over splits, hi + lo / kLoScale    [m, most_rank], by row
//     T = s_g S                     in X's type, as hi and lo          [m, width] each, by position
//
// Or T alone from a saved S. Only the columns of a row's own rank are read and written.
#pragma once
#include "kernel/lora_grouped_operands.h"
#include "kernel/sum_of_splits.h"

namespace lora_ext::kernel {

template <class T>
struct LoraGroupedReduceParams {
  const float* z;        // [splits, m, z_pitch], by position; null if S is given
  float* s;              // [m, most_rank], written; may be null
  const float* saved;    // [m, most_rank]; may be null
  const float* scaling;  // [groups]
  T* t[2];               // [m, t_pitch], hi and lo; lo may be null
  int64_t t_pitch;
  int m, splits, terms, z_pitch, most_rank;
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
  const int rank = rank_of(p.factors, piece.adapter, p.most_rank), width = whole_chunks(rank);
  for (int i = static_cast<int>(threadIdx.x); i < piece.count * rank; i += 256) {
    const int at = piece.begin + i / rank, row = PositionedRows{p.order, p.m}(at);
    const int64_t position = at, column = i % rank;
    const int64_t in_s = static_cast<int64_t>(row) * p.most_rank + column;
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

}  // namespace lora_ext::kernel
