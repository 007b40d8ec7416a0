// lora_grouped_shrink: the skinny product of many adapters, each row with its own, split along k.
// lora_grouped_reduce sums the splits.
//
//     forward   Z[split] = drop(X) A_g^T     at the positions of g's rows     [m, its columns]
//     dS        Z[split] = dY B_g
//
// lora_shrink on a tile of 64 positions of one adapter. A tile gathers its rows of X, once for every
// 64 columns, and has as many columns as its adapter's rank takes.
#pragma once
#include "kernels/grouped/operands.h"
#include "kernels/skinny/shrink.h"
#include "kernels/tile/expert_rows.h"

namespace lora_ext::kernel {

template <class T>
struct LoraGroupedShrinkParams {
  const T* x;  // [m, k]
  float* z;    // [splits, m, z_pitch], by position; with two terms lo's columns follow hi's
  int64_t x_pitch;
  int m, k, z_pitch, max_rank;
  int terms;            // 2 for factors in floats, or in halves of both terms along the rank
  int steps_per_split;  // of 64 along k
  LoraGroupedFactors factors;
  const LoraGroupedPiece* tiles;
  const int *rows, *mask_rows;  // of X and of its mask, as in LoraGroupedPlaces
  Mask mask;                    // of X; only for masked kernels
};

template <class T, class F, bool kMNMajor, bool kMasked, Alignment kAlignment>
struct LoraGroupedShrinkSm80 {
  using Tile = LoraShrinkTile;
  using Copy = TileCopy<T, Tile::kThreads, kAlignment>;
  using Factor = FactorTile<T, F, kMNMajor, Tile::kThreads>;
  using Product = LoraShrinkProduct<T, kMNMajor, kMasked>;
  static constexpr int kCopies = Tile::kM * 8 / Tile::kThreads;  // chunks of X per thread
  static_assert(Tile::kM == LoraGroupedTables::kTileRows);

  const LoraGroupedShrinkParams<T>& p;
  const LoraGroupedPiece piece;
  const Factor factor;
  const int columns;  // of Z: hi's, then lo's
  const uint32_t shared = ptx::shared_address(ptx::dynamic_shared_memory());
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int column0 = static_cast<int>(blockIdx.y) * Tile::kN;
  const int first_step = static_cast<int>(blockIdx.z) * p.steps_per_split;
  const int end_step = min(first_step + p.steps_per_split, (p.k + Tile::kK - 1) / Tile::kK);

  __device__ __forceinline__ uint32_t stage_of(int step) const {
    return static_cast<uint32_t>((step - first_step) % Tile::kStages) * Tile::kStageBytes;
  }

  __device__ __forceinline__ void load(const int (&rows)[kCopies], int step) const {
    if (step < end_step) {
      const Copy copy{shared};
      const uint32_t stage = stage_of(step);
      const int k0 = step * Tile::kK, chunk = static_cast<int>(threadIdx.x) % 8;
#pragma unroll
      for (int i = 0; i < kCopies; ++i) {
        const int in_tile = (static_cast<int>(threadIdx.x) + i * Tile::kThreads) / 8;
        copy.copy_chunk(stage + row_chunk_offset(in_tile, chunk), {p.x, p.x_pitch, p.m, p.k},
                        rows[i], k0 + chunk * 8);
      }
      const uint32_t right = stage + Tile::kLeftBytes;
      if constexpr (kMNMajor) {
        factor.template copy<Tile::kK, Tile::kN>(shared, right, k0, column0);
      } else {
        factor.template copy<Tile::kN, Tile::kK>(shared, right, column0, k0);
      }
    }
    ptx::cp_async_commit_group();
  }

  __device__ __forceinline__ void store(const typename Product::Accumulators& acc) const {
    float* z = p.z + (static_cast<int64_t>(blockIdx.z) * p.m + piece.begin) * p.z_pitch;
#pragma unroll
    for (int j = 0; j < Product::kColumnBlocks; ++j) {
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        const int position = warp * 16 + e / 2 * 8 + lane / 4;
        const int column = column0 + j * 8 + lane % 4 * 2 + e % 2;
        if (position < piece.count && column < columns)
          z[static_cast<int64_t>(position) * p.z_pitch + column] = acc[j][e];
      }
    }
  }

  __device__ __forceinline__ void run() const {
    // m is out of range.
    const auto row_of = [&](int position) { return row_in_piece(p.rows, piece, position, p.m); };
    const auto mask_row_of = [&](int position) {
      return row_in_piece(p.mask_rows, piece, position, p.m);
    };
    int rows[kCopies];
#pragma unroll
    for (int i = 0; i < kCopies; ++i)
      rows[i] = row_of((static_cast<int>(threadIdx.x) + i * Tile::kThreads) / 8);
    const int in_fragment = warp * 16 + lane / 4;
    const Product product{p.mask, {mask_row_of(in_fragment), mask_row_of(in_fragment + 8)}};
    for (int i = 0; i < Tile::kStages - 1; ++i) load(rows, first_step + i);
    typename Product::Accumulators acc;
    product.clear(acc);
    for (int step = first_step; step < end_step; ++step) {
      ptx::cp_async_wait_group<Tile::kStages - 2>();
      __syncthreads();  // before a read of the loaded stage and before a write to the freed one
      load(rows, step + Tile::kStages - 1);
      product.multiply(acc, shared + stage_of(step), step * Tile::kK);
    }
    store(acc);
  }
};

// Grid: tiles, tiles along the columns of the largest rank, splits.
template <class T, class F, bool kMNMajor, bool kMasked, Alignment kAlignment>
__global__ void __launch_bounds__(LoraShrinkTile::kThreads)
    lora_grouped_shrink_sm80(const __grid_constant__ LoraGroupedShrinkParams<T> p) {
  using Shrink = LoraGroupedShrinkSm80<T, F, kMNMajor, kMasked, kAlignment>;
  const LoraGroupedPiece piece = p.tiles[blockIdx.x];
  if (piece.count == 0) return;
  const LoraGroupedEntry entry = entry_of<F>(p.factors, piece.adapter);
  const int rank = clamped_rank(entry.rank, p.max_rank);
  const int width = whole_chunks(rank), columns = p.terms == 2 ? 2 * width : rank;
  if (static_cast<int>(blockIdx.y) * LoraShrinkTile::kN >= columns) return;
  const typename Shrink::Factor factor{static_cast<const F*>(kMNMajor ? entry.b : entry.a),
                                       kMNMajor ? entry.b_pitch : entry.a_pitch,
                                       Shrink::Factor::kSplit ? rank : columns, p.k, width};
  Shrink{p, piece, factor, columns}.run();
}

// lora_grouped_reduce: sums the splits of lora_grouped_shrink, in one fixed order.
//
//     S = keep_scale * sum of Z     over splits, hi + lo / kLoScale    [m, max_rank], by row
//     T = s_g S                     in X's type, as hi and lo          [m, width] each, by position
//
// Or T alone from a saved S. Only the columns of a row's own rank are read and written. A backward
// wants dS and s_g S, and where rows have weights both with them besides, in one launch.
template <class T>
struct LoraGroupedReduced {
  const float* z;      // [splits, m, z_pitch], by position; null if S is given
  float* s;            // [m, max_rank], written; may be null
  const float* saved;  // [m, max_rank]; may be null
  T* t[2];             // [m, t_pitch], hi and lo; lo may be null
  float keep_scale;
  LoraGroupedWeights row_weights;  // of T
};
template <class T>
struct LoraGroupedReduceParams {
  LoraGroupedReduced<T> of[3];  // one for each blockIdx.y; the last ones may be missing
  const float* scaling;         // [groups]; if null, one_scaling is that of all
  float one_scaling;
  int64_t t_pitch;
  int m, splits, terms, z_pitch, max_rank;
  LoraGroupedFactors factors;
  const LoraGroupedPiece* tiles;
  const int* rows;  // of S, at each position

  unsigned count() const { return of[2].t[0] != nullptr ? 3 : of[1].t[0] != nullptr ? 2 : 1; }
};

// Grid: tiles of positions, what is reduced. One thread per element of T.
template <class T>
__global__ void __launch_bounds__(256)
    lora_grouped_reduce(const __grid_constant__ LoraGroupedReduceParams<T> p) {
  const LoraGroupedPiece piece = p.tiles[blockIdx.x];
  const LoraGroupedReduced<T>& reduced = p.of[blockIdx.y];
  const int rank = rank_of(p.factors, piece.adapter, p.max_rank), width = whole_chunks(rank);
  const float scaling = p.scaling != nullptr ? p.scaling[piece.adapter] : p.one_scaling;
  for (int i = static_cast<int>(threadIdx.x); i < piece.count * rank; i += 256) {
    const int at = piece.begin + i / rank, row = PositionedRows{p.rows, p.m}(at);
    const int64_t position = at, column = i % rank;
    const int64_t in_s = static_cast<int64_t>(row) * p.max_rank + column;
    float s = 0.f;
    if (reduced.saved != nullptr) {
      s = reduced.saved[in_s];
    } else {
      const float* z = reduced.z + position * p.z_pitch + column;
      s = reduced.keep_scale *
          sum_of_splits<T>(z, p.splits, static_cast<int64_t>(p.m) * p.z_pitch, p.terms, width);
      if (reduced.s != nullptr) reduced.s[in_s] = s;
    }
    const LoraGroupedWeights& weights = reduced.row_weights;
    float weight = 1.f;
    if (weights.of != nullptr)
      weight = weight_at<T>(weights.of, weights.in_float,
                            weights.slots != nullptr ? weights.slots[at] : at);
    const float t = scaling * s * weight;
    reduced.t[0][position * p.t_pitch + column] = high_half<T>(t);
    if (reduced.t[1] != nullptr) reduced.t[1][position * p.t_pitch + column] = low_half<T>(t);
  }
}

}  // namespace lora_ext::kernel
