// lora_grouped_gemm: lora_gemm with many adapters; each row of T has its own U.
//
//     Y = P Q + mask * (T U_g) + bias          forward: U_g = B_g^T         dX: U_g = A_g
//
// The main loop over P and Q is that of lora_gemm, over rows in the order of their adapters:
// `order` gives the rows of P and Y in a tile. Low-rank steps follow for each adapter that has rows
// in the tile, as many as its rank needs; with sorted rows these are one or two adapters. With k =
// 0 it computes the update alone, onto a base or for the library to add onto.
//
// With floats there are three terms for each adapter, lo hi, hi lo, hi hi, one after the other.
#pragma once
#include <climits>

#include "kernels/gemm/sm80/kernel.h"
#include "kernels/grouped/operands.h"

namespace lora_ext::kernel {

template <class T>
struct LoraGroupedGemmParams {
  LoraGemmParams<T> gemm;  // its low_rank, u_pitch, rank and terms are not used
  const T* t;              // [m, gemm.t_pitch], by position
  int lo_column;           // first lo column of T, if the factors are in floats
  LoraGroupedFactors factors;
  const LoraGroupedSegment* segments;
  const int *first, *order;
};

// The interface of the low-rank product to LoraGemmSm80 (OneAdapter), for many adapters.
template <class T, class F, bool kMNMajor>
struct ManyAdapters : TilesOfAllRows {
  static constexpr int kTerms = std::is_same_v<F, float> ? 3 : 1;
  static constexpr bool kAddsOntoBase = true;
  using Rows = PositionedRows;

  const LoraGroupedGemmParams<T>& g;
  const Rows rows{g.order, g.gemm.m};

  // Number of low-rank steps of a tile, and the next one: segment index, and step index within it.
  struct Cursor {
    int steps, segment, step;
  };
  __device__ __forceinline__ static int parts(const LoraGemmParams<T>&) { return 1; }
  __device__ __forceinline__ static int steps(const LoraGemmParams<T>&, const Cursor& cursor) {
    return cursor.steps;
  }

  // Begins at the tile whose first row is `row`.
  __device__ __forceinline__ void begin(Cursor& cursor, int row) const {
    constexpr int kRows = LoraGroupedTables::kRowTileRows;
    const int tile = row / kRows, next = g.first[tile + 1];
    cursor.segment = g.first[tile], cursor.step = 0;
    // The next tile's first segment may begin in this one.
    const int end = next + static_cast<int>(g.segments[next].begin < row + kRows);
    cursor.steps = kTerms * (g.segments[end].steps - g.segments[cursor.segment].steps);
  }

  // The step at a cursor, which take() advances: 64 along the segment's rank of one term.
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

  template <class Loads>
  __device__ __forceinline__ static void begin_part(Loads&, int /*part*/) {}
  template <class Loads>
  __device__ __forceinline__ void copy_step(Loads& loads) const {
    if (loads.low_rank) {
      load(loads);
      --loads.steps;
    } else {
      loads.copy_step();
    }
  }

  // Loads the segment's rows of T in the tile, zeros for other rows, and its U.
  template <class Loads>
  __device__ __forceinline__ void load(Loads& loads) const {
    using Tile = typename Loads::TileOf;
    static_assert(Tile::kM == LoraGroupedTables::kRowTileRows && Tile::kK == 64);
    const Step step = take(loads.cursor);
    const LoraGemmPlace at = loads.raster.place_of(loads.tile);
    const int rank = step.segment.rank;
    const TileCopy<T, Tile::kThreads, Alignment::kVector> copy{loads.shared};
    const T* t = g.t + (kTerms == 3 && step.term == 0 ? g.lo_column : 0);
#pragma unroll 1  // unrolled, the addresses of each chunk would stay in registers throughout
    for (int index = static_cast<int>(threadIdx.x); index < Tile::kM * 8; index += Tile::kThreads) {
      const int position = at.row + index / 8, chunk = index % 8;
      copy.copy_chunk(loads.stage + row_chunk_offset(index / 8, chunk),
                      {t, g.gemm.t_pitch, step.segment.end, rank},
                      position >= step.segment.begin ? position : step.segment.end,
                      step.k0 + chunk * 8);
    }
    const LoraGroupedEntry entry = entry_of<F>(g.factors, step.segment.adapter);
    const int lo_from = kTerms == 3 && step.term == 1 ? 0 : INT_MAX;
    const uint32_t to = loads.stage + Tile::kLeftBytes;
    constexpr int kFloatChunks = Tile::kN == 64 ? 4 : 2;
    if constexpr (kMNMajor) {
      const FactorTile<T, F, false, Tile::kThreads> a{static_cast<const F*>(entry.a), entry.a_pitch,
                                                      rank, g.gemm.n, lo_from};
      a.template copy<Tile::kK, Tile::kN, kFloatChunks>(loads.shared, to, step.k0, at.column);
    } else {
      const FactorTile<T, F, true, Tile::kThreads> b{static_cast<const F*>(entry.b), entry.b_pitch,
                                                     rank, g.gemm.n, lo_from};
      b.template copy<Tile::kN, Tile::kK, kFloatChunks>(loads.shared, to, at.column, step.k0);
    }
  }

  template <class Loads>
  __device__ __forceinline__ static bool copies_apart(const Loads& loads) {
    return loads.low_rank;
  }

  // T U of the tile whose rows begin at `row`.
  template <class Gemm>
  __device__ __forceinline__ void multiply(const Gemm& gemm, typename Gemm::Accumulators& acc,
                                           typename Gemm::Walk& walk, typename Gemm::Loads& loads,
                                           const Span& rows_of_tile) const {
    const int row = rows_of_tile.begin;
    Cursor cursor;
    begin(cursor, row);
#pragma unroll 1
    for (int i = 0; i < cursor.steps; ++i) {
      const Step step = take(cursor);
      const int first = row + gemm.warp.row;
      const int begin = step.segment.begin - first, end = step.segment.end - first;
      const float scale = step.term == kTerms - 1 ? 1.f : 1.f / kLoScale<T>;
#pragma unroll 1
      for (int k16 = 0; k16 < min((step.segment.rank - step.k0 + 15) / 16, 4); ++k16)
        multiply_rows(gemm.warp, acc, walk.stage, k16, begin, end, scale);
      gemm.finish_step(walk, loads);
      loads.step();
    }
  }

  // The sums are added only to rows [begin, end) of the warp, so that no value of an adapter, NaN
  // included, reaches rows of another.
  template <class Warp>
  __device__ __forceinline__ static void multiply_rows(const Warp& warp,
                                                       typename Warp::Accumulators& acc,
                                                       uint32_t stage, int k16, int begin, int end,
                                                       float scale) {
#pragma unroll
    for (int i = 0; i < Warp::kRowBlocks; ++i) {
      if (i * 16 >= end || i * 16 + 16 <= begin) continue;
      const int row = i * 16 + warp.lane / 4;
      const bool upper = row >= begin && row < end, lower = row + 8 >= begin && row + 8 < end;
      uint32_t a[4];
      warp.load_left(a, stage, i, k16);
#pragma unroll
      for (int pair = 0; pair < Warp::kPairs; ++pair) {
        uint32_t b[4];
        warp.load_right(b, stage, pair, k16);
#pragma unroll
        for (int right = 0; right < 2; ++right) {
          float sums[4] = {0.f, 0.f, 0.f, 0.f};
          ptx::mma_m16n8k16<T>(sums, a, {b[right * 2], b[right * 2 + 1]});
          float (&to)[4] = acc[i][pair * 2 + right];
          if (upper) to[0] += scale * sums[0], to[1] += scale * sums[1];
          if (lower) to[2] += scale * sums[2], to[3] += scale * sums[3];
        }
      }
    }
  }
};

template <class T, class F, class Tile, bool kMNMajor, bool kMasked>
__global__ void __launch_bounds__(Tile::kThreads, 1)
    lora_grouped_gemm_sm80(const __grid_constant__ LoraGroupedGemmParams<T> p) {
  using Adapters = ManyAdapters<T, F, kMNMajor>;
  if constexpr (has_code<Tile>)
    LoraGemmSm80<T, Tile, kMNMajor, kMasked, Adapters>{p.gemm, Adapters{{}, p}}.run();
}

}  // namespace lora_ext::kernel
