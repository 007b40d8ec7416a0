// lora_grouped_wgrad: the gradients of many adapters, each a sum over its own rows.
//
//     dA_g   P = drop(X), U = dS      P^T U over g's rows, [rank, K]
//     dB_g   P = dY,      U = s S     here [N, rank]
//
// lora_wgrad on one piece of an adapter's positions. A segment of one piece writes its gradient
// directly; the pieces of a longer one write partial sums, which lora_grouped_reduce_wgrad sums in
// their order. With floats, U's hi and lo halves are in one tile, 32 columns each, so that a thread
// has both parts of a sum.
#pragma once
#include "kernels/grouped/operands.h"
#include "kernels/skinny/wgrad.h"

namespace lora_ext::kernel {

template <class T>
struct LoraGroupedWgradProduct {
  const T* p;       // [m, c], by row
  const int* rows;  // of P, at each position
  const T* u;       // [m, u_pitch], by position
  float* partial;   // [slots, max_rank, c]
  int64_t p_pitch, u_pitch;
  int c, c_tiles;
  bool masked;  // whether P is masked; only in masked kernels
};

template <class T>
struct LoraGroupedWgradParams {
  LoraGroupedWgradProduct<T> product[2];  // dA, dB; no tiles if not wanted
  LoraGroupedFactors gradients, factors;  // only the ranks of the factors are used
  const LoraGroupedPiece* pieces;
  const int* mask_rows;  // at each position
  int m, max_rank;
  int lo_column;  // first lo column of U, if the gradients are in floats
  Mask mask;
};

template <class T, class F, bool kMasked, Alignment kAlignment>
struct LoraGroupedWgradSm80 {
  using Tile = LoraWgradTile;
  using Copy = TileCopy<T, Tile::kThreads, kAlignment>;
  using Multiply = LoraWgradMultiply<T, kMasked>;
  static constexpr bool kSplit = std::is_same_v<F, float>;
  static constexpr int kColumns = kSplit ? Tile::kColumns / 2 : Tile::kColumns;  // along the rank

  const LoraGroupedWgradParams<T>& p;
  const LoraGroupedPiece piece;
  const bool of_b;
  const LoraGroupedWgradProduct<T>& product = p.product[of_b];
  const int rank = rank_of(p.factors, piece.adapter, p.max_rank);
  const uint32_t shared = ptx::shared_address(ptx::dynamic_shared_memory());
  const int c0 = (static_cast<int>(blockIdx.y) - (of_b ? p.product[0].c_tiles : 0)) * Tile::kC;
  const int column0 = static_cast<int>(blockIdx.z) * kColumns;
  const int steps = (piece.count + Tile::kM - 1) / Tile::kM;

  __device__ __forceinline__ static uint32_t stage_of(int step) {
    return static_cast<uint32_t>(step % Tile::kStages) * Tile::kStageBytes;
  }

  __device__ __forceinline__ void load(int step) const {
    if (step < steps) {
      const Copy copy{shared};
      const uint32_t tile = stage_of(step);
      constexpr int kChunks = Tile::kC / 8, kRowsAtOnce = Tile::kThreads / kChunks;
      const int chunk = static_cast<int>(threadIdx.x) % kChunks;
#pragma unroll
      for (int i = 0; i < Tile::kM / kRowsAtOnce; ++i) {
        const int row = static_cast<int>(threadIdx.x) / kChunks + i * kRowsAtOnce;
        copy.copy_chunk(tile + panel_chunk_offset<Tile::kM>(row, chunk),
                        {product.p, product.p_pitch, p.m, product.c},
                        row_in_piece(product.rows, piece, step * Tile::kM + row, p.m),
                        c0 + chunk * 8);
      }
      load_u(tile + Tile::kLeftBytes, step);
    }
    ptx::cp_async_commit_group();
  }

  // U is in the workspace, in whole chunks.
  __device__ __forceinline__ void load_u(uint32_t tile, int step) const {
    const TileCopy<T, Tile::kThreads, Alignment::kVector> copy{shared};
#pragma unroll
    for (int i = 0; i < Tile::kM * 8 / Tile::kThreads; ++i) {
      const int index = static_cast<int>(threadIdx.x) + i * Tile::kThreads;
      const int row = index / 8, chunk = index % 8 % (kColumns / 8);
      const int64_t lo = static_cast<int64_t>(index % 8 / (kColumns / 8)) * p.lo_column;
      copy.copy_chunk(
          tile + row_chunk_offset(row, index % 8),
          {product.u + piece.begin * product.u_pitch + lo, product.u_pitch, piece.count, rank},
          step * Tile::kM + row, column0 + chunk * 8);
    }
  }

  // Adds the lo half of each sum to its hi half, if there are two.
  __device__ __forceinline__ static void add_lo(typename Multiply::Accumulators& acc) {
    constexpr int kApart = Multiply::kColumnBlocks / 2;
#pragma unroll
    for (int i = 0; i < Multiply::kRowBlocks * kApart * 4; ++i) {
      float (&row)[Multiply::kColumnBlocks][4] = acc[i / (kApart * 4)];
      const int j = i / 4 % kApart;
      row[j][i % 4] += row[j + kApart][i % 4] * (1.f / kLoScale<T>);
    }
  }

  __device__ __forceinline__ void store(const Multiply& multiply,
                                        const typename Multiply::Accumulators& acc) const {
    const LoraGroupedEntry to = entry_of<F>(p.gradients, piece.adapter);
    float* partial = product.partial + static_cast<int64_t>(piece.slot) * p.max_rank * product.c;
    multiply.for_each(acc, [&](int c, int in_tile, float sum) {
      const int64_t column = column0 + in_tile;
      if (c >= product.c || in_tile >= kColumns || column >= rank) return;
      if (piece.slot >= 0) {
        partial[column * product.c + c] = sum;
      } else if (of_b) {
        static_cast<F*>(to.b)[c * to.b_pitch + column * p.gradients.b_step] = to_element(sum);
      } else {
        static_cast<F*>(to.a)[column * to.a_pitch + c] = to_element(sum);
      }
    });
  }
  // drop(X) includes keep_scale, but the elements multiplied here are those of X, not scaled.
  __device__ __forceinline__ F to_element(float sum) const {
    const float scaled = product.masked ? p.mask.keep_scale * sum : sum;
    if constexpr (kSplit) {
      return scaled;
    } else {
      return rounded<F>(scaled);
    }
  }

  __device__ __forceinline__ void run() const {
    if (column0 >= rank) return;
    for (int i = 0; i < Tile::kStages - 1; ++i) load(i);
    const Multiply multiply{p.mask, c0};
    typename Multiply::Accumulators acc;
    multiply.clear(acc);
    for (int step = 0; step < steps; ++step) {
      ptx::cp_async_wait_group<Tile::kStages - 2>();
      __syncthreads();  // before a read of the loaded stage and before a write to the freed one
      load(step + Tile::kStages - 1);
      multiply.multiply(
          acc, shared + stage_of(step), step * Tile::kM, product.masked,
          [&](int position) { return row_in_piece(p.mask_rows, piece, position, p.m); });
    }
    if constexpr (kSplit) add_lo(acc);
    store(multiply, acc);
  }
};

// Grid: pieces, tiles along the columns of X and then of dY, tiles along the largest rank. Shared
// memory has room for three blocks on an SM of sm_90, and with masks ptxas would not leave them the
// registers. Loads of single elements need more of them than those.
template <class T, class F, bool kMasked, Alignment kAlignment>
__global__ void __launch_bounds__(LoraWgradTile::kThreads, kAlignment == Alignment::kVector ? 3 : 1)
    lora_grouped_wgrad_sm80(const __grid_constant__ LoraGroupedWgradParams<T> p) {
  const LoraGroupedPiece piece = p.pieces[blockIdx.x];
  if (piece.count == 0) return;
  const bool of_b = static_cast<int>(blockIdx.y) >= p.product[0].c_tiles;
  LoraGroupedWgradSm80<T, F, kMasked, kAlignment>{p, piece, of_b}.run();
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
  const LoraGroupedReduceGradient& gradient = p.gradient[of_b];
  const LoraGroupedSum sum = p.sums[adapter];
  const LoraGroupedEntry to = entry_of<F>(p.gradients, adapter);
  const int rank = rank_of(p.factors, adapter, p.max_rank);
  const int end = p.gradients.entries == nullptr ? p.max_rank : rank;
  const int first = sum.pieces == 1 ? rank : 0, ranks = end - first;  // one piece: complete
  const int64_t count = static_cast<int64_t>(ranks) * gradient.c;
  const int64_t step = static_cast<int64_t>(gridDim.y) * blockDim.x;
  for (int64_t i = static_cast<int64_t>(blockIdx.y) * blockDim.x + threadIdx.x; i < count;
       i += step) {
    const int64_t column = first + (of_b ? i % ranks : i / gradient.c);
    const int64_t c = of_b ? i / ranks : i % gradient.c;
    float value = 0.f;
    if (column < rank) {
      const int64_t size = static_cast<int64_t>(p.max_rank) * gradient.c;
      value = gradient.scale *
              sum_of_splits<T>(gradient.partial + sum.slot * size + column * gradient.c + c,
                               sum.pieces, size, 1, 0);
    }
    F* element = of_b ? static_cast<F*>(to.b) + c * to.b_pitch + column * p.gradients.b_step
                      : static_cast<F*>(to.a) + column * to.a_pitch + c;
    if constexpr (std::is_same_v<F, float>) {
      *element = value;
    } else {
      *element = rounded<F>(value);
    }
  }
}

}  // namespace lora_ext::kernel
