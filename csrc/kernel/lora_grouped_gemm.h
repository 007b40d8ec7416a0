// lora_grouped_gemm: lora_gemm with many adapters, each row of T with its own U.
//
//     Y = P Q + mask * (T U_g) + bias          forward: U_g = B_g^T         dX: U_g = A_g
//
// The main loop over P and Q is lora_gemm's, over rows in the order of their adapters: a tile's
// rows of P and Y are where `order` says. Low-rank steps follow each adapter that has rows in the
// tile, as many as its own rank needs; with rows in order these are one or two. With k = 0 it is
// the update alone, onto a base or for the library to add onto.
//
// Of floats three terms, lo hi, hi lo, hi hi, one after the other for each adapter.
#pragma once
#include <climits>

#include "kernel/lora_gemm_sm80.h"
#include "kernel/lora_grouped_operands.h"

namespace lora_ext::kernel {

template <class T>
struct LoraGroupedGemmParams {
  LoraGemmParams<T> gemm;  // its low_rank, u_pitch, rank and terms are not used
  const T* t;              // [m, gemm.t_pitch], by position
  int lo_column;           // of T, where the factors are in floats
  LoraGroupedFactors factors;
  const LoraGroupedSegment* segments;
  const int *first, *order;
};

// What LoraGemmSm80 asks of the low-rank product (OneAdapter), of many adapters.
template <class T, class F, bool kMNMajor>
struct ManyAdapters {
  static constexpr int kTerms = std::is_same_v<F, float> ? 3 : 1;
  using Rows = PositionedRows;

  const LoraGroupedGemmParams<T>& g;
  const Rows rows{g.order, g.gemm.m};

  // How many low-rank steps a tile has, and the next: of this segment, the so manieth.
  struct Cursor {
    int steps, segment, step;
  };
  template <class Gemm>
  __device__ __forceinline__ static int steps(const Gemm&, const Cursor& cursor) {
    return cursor.steps;
  }

  // Of a tile whose rows begin at `row`.
  __device__ __forceinline__ void begin(Cursor& cursor, int row) const {
    constexpr int kRows = LoraGroupedTables::kRowTileRows;
    const int tile = row / kRows, next = g.first[tile + 1];
    cursor.segment = g.first[tile], cursor.step = 0;
    // The next tile's first segment may have begun in this one.
    const int end = next + static_cast<int>(g.segments[next].begin < row + kRows);
    cursor.steps = kTerms * (g.segments[end].steps - g.segments[cursor.segment].steps);
  }

  // Without a main product, a tile whose rows have no adapters has no steps.
  template <class Gemm>
  __device__ __forceinline__ void begin_next(const Gemm& gemm, typename Gemm::Walk& next) const {
    do {
      next.tile += static_cast<int>(gridDim.x), next.step = 0;
      if (next.tile >= gemm.tiles) return;
      begin(next.cursor, gemm.place_of(next.tile).row);
    } while (gemm.steps_of(next) == 0);
  }

  // The step at a cursor, which it leaves behind: of a term, 64 along the segment's rank.
  struct Step {
    LoraGroupedSegment segment;
    int term, k0;
  };
  __device__ __forceinline__ Step take(Cursor& cursor) const {
    const LoraGroupedSegment segment = g.segments[cursor.segment];
    const int steps = (segment.rank + 63) / 64, term = cursor.step / steps;
    const Step taken{segment, term, (cursor.step - term * steps) * 64};
    ++cursor.step;
    if (cursor.step == kTerms * steps) ++cursor.segment, cursor.step = 0;
    return taken;
  }

  // The segment's rows of T in the tile, zeros for others, and its U.
  template <class Gemm>
  __device__ __forceinline__ void load(const Gemm& gemm, typename Gemm::Walk& walk, int /*index*/,
                                       const typename Gemm::Place& at) const {
    using Tile = typename Gemm::TileOf;
    static_assert(Tile::kM == LoraGroupedTables::kRowTileRows && Tile::kK == 64);
    const Step step = take(walk.cursor);
    const int rank = step.segment.rank;
    const auto stage = static_cast<uint32_t>(walk.stage) * Tile::kStageBytes;
    const TileCopy<T, Tile::kThreads, Alignment::kVector> copy{gemm.shared};
    const T* t = g.t + (kTerms == 3 && step.term == 0 ? g.lo_column : 0);
    copy.template copy_rows<Tile::kM, Tile::kK>(
        stage, {t, gemm.p.t_pitch, step.segment.end, rank}, step.k0, [&](int row) {
          const int position = at.row + row;
          return position >= step.segment.begin ? position : step.segment.end;
        });
    const LoraGroupedEntry entry = entry_of<F>(g.factors, step.segment.adapter);
    const int lo_from = kTerms == 3 && step.term == 1 ? 0 : INT_MAX;
    if constexpr (kMNMajor) {
      const FactorTile<T, F, false, Tile::kThreads> a{static_cast<const F*>(entry.a), entry.a_pitch,
                                                      rank, gemm.p.n, lo_from};
      a.template copy<Tile::kK, Tile::kN>(gemm.shared, stage + Tile::kLeftBytes, step.k0,
                                          at.column);
    } else {
      const FactorTile<T, F, true, Tile::kThreads> b{static_cast<const F*>(entry.b), entry.b_pitch,
                                                     rank, gemm.p.n, lo_from};
      b.template copy<Tile::kN, Tile::kK>(gemm.shared, stage + Tile::kLeftBytes, at.column,
                                          step.k0);
    }
  }

  template <class Gemm>
  __device__ __forceinline__ void multiply(const Gemm& gemm, typename Gemm::Accumulators& acc,
                                           typename Gemm::Walk& walk) const {
    if (!gemm.step_of(walk).low_rank) return gemm.multiply(acc, walk.stage, 4);
    const Step step = take(walk.cursor);
    const int row = gemm.place_of(walk.tile).row + gemm.warp_row;
    const int begin = step.segment.begin - row, end = step.segment.end - row;
    const float scale = step.term == kTerms - 1 ? 1.f : 1.f / kLoScale<T>;
#pragma unroll 1
    for (int k16 = 0; k16 < min((step.segment.rank - step.k0 + 15) / 16, 4); ++k16)
      multiply_rows(gemm, acc, walk.stage, k16, begin, end, scale);
  }

  // The sums go to rows [begin, end) of the warp's alone, so that nothing of an adapter, NaN
  // included, reaches the rows of others.
  template <class Gemm>
  __device__ __forceinline__ static void multiply_rows(const Gemm& gemm,
                                                       typename Gemm::Accumulators& acc, int stage,
                                                       int k16, int begin, int end, float scale) {
    const uint32_t tile = gemm.shared + static_cast<uint32_t>(stage) * Gemm::TileOf::kStageBytes;
#pragma unroll
    for (int i = 0; i < Gemm::Epilogue::kRowBlocks; ++i) {
      if (i * 16 >= end || i * 16 + 16 <= begin) continue;
      const int row = i * 16 + gemm.lane / 4;
      const bool upper = row >= begin && row < end, lower = row + 8 >= begin && row + 8 < end;
      uint32_t a[4];
      gemm.load_left_block(a, tile, i, k16);
#pragma unroll
      for (int j = 0; j < Gemm::Epilogue::kColumnBlocks; j += 2) {
        uint32_t b[4];
        gemm.load_right_pair(b, tile + Gemm::TileOf::kLeftBytes, j, k16);
#pragma unroll
        for (int right = 0; right < 2; ++right) {
          float sums[4] = {0.f, 0.f, 0.f, 0.f};
          ptx::mma_m16n8k16<T>(sums, a, {b[right * 2], b[right * 2 + 1]});
          float (&to)[4] = acc[i][j + right];
          if (upper) to[0] += scale * sums[0], to[1] += scale * sums[1];
          if (lower) to[2] += scale * sums[2], to[3] += scale * sums[3];
        }
      }
    }
  }
};

template <class T, class F, class Tile, bool kMNMajor, bool kMasked, Alignment kAlignment>
__global__ void __launch_bounds__(Tile::kThreads, 1)
    lora_grouped_gemm_sm80(const __grid_constant__ LoraGroupedGemmParams<T> p) {
  using Adapters = ManyAdapters<T, F, kMNMajor>;
  LoraGemmSm80<T, Tile, kMNMajor, kMasked, kAlignment, Adapters>{p.gemm, Adapters{p}}.run();
}

}  // namespace lora_ext::kernel
