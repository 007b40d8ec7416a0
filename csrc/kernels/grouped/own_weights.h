// lora_grouped_gemm_own_weights: lora_gemm for the experts of a mixture, each with its own W.
//
//     Y = P Q_e + mask * (T U_e) + bias_e      forward: Q_e = W_e^T, U_e = B_e^T
//                                              dX:      Q_e = W_e,   U_e = A_e
//
// A tile has rows of one expert and one of its U, a piece of LoraGroupedTables::row_tiles. Rows
// past its end are zeros in shared memory, and are not stored. Where no expert has rows, W is not
// read. Tiles without an expert store zeros; empty ones, behind them, are passed over, and those of
// experts whose W is not there.
//
// U is in T's type: a pool that has the halves of a factor in floats, hi and then lo. The three terms
// of T U are then one product, along a depth of three widths:
//
//     T   lo hi hi        rank of them, and zeros up to the width
//     U   hi lo hi
#pragma once
#include <climits>

#include "kernels/gemm/sm80/kernel.h"
#include "kernels/grouped/operands.h"

namespace lora_ext::kernel {

// gemm: its u and bias are those of expert 0, its q that of first_expert, its t is by position. Of Q and U each may be
// K-major or MN-major. Unlike elsewhere whole_chunks is of P, Q and Y, and may be false with k > 0.
template <class T>
struct LoraOwnWeightsParams {
  LoraGemmParams<T> gemm;
  int64_t q_stride, u_stride, bias_stride;  // elements from one to the next
  int first_expert, end_expert;             // whose W q has; rows of no expert are with the first's
  int width;                                // of T's and of U's hi, whole chunks
  const LoraGroupedPiece* row_tiles;
  int row_tile_count;
  const int *p_rows, *y_rows, *mask_rows;  // as in LoraGroupedPlaces
  int q_rows;                              // on wgmma: q_stride in rows of Q
};

// The interface of the low-rank product and of the tiles' rows to LoraGemmSm80. kWholeSteps: the term
// of hi hi begins with a step of its own.
template <class T, bool kMNMajor, bool kUMNMajor, bool kWholeSteps = false>
struct OwnWeights {
  using Rows = PositionedRows;
  static constexpr bool kAddsOntoBase = false;

  const LoraOwnWeightsParams<T>& o;
  const LoraGemmParams<T>& p = o.gemm;
  const Rows rows{o.p_rows, p.m};

  // The rows of a tile.
  struct Span {
    int weight, begin, count;  // weight: the expert's number; -1: no expert's
    template <class Params>
    __device__ __forceinline__ int end(const Params&) const {
      return begin + count;
    }
    __device__ __forceinline__ bool is_empty() const { return count == 0; }
    __device__ __forceinline__ bool has_products() const { return weight >= 0 && count > 0; }
  };
  // The tile that is loaded: its number, as the span itself would take three registers throughout.
  struct Cursor {
    int tile;
  };

  template <class Params>
  __device__ __forceinline__ int row_tiles(const Params&, int /*rows*/) const {
    return o.row_tile_count;
  }
  // Empty where the expert's W is not there.
  __device__ __forceinline__ Span span_of(const Cursor& cursor, int /*row*/ = 0) const {
    const LoraGroupedPiece piece = o.row_tiles[cursor.tile];
    const int expert = max(piece.slot, 0);
    const auto from_first = static_cast<unsigned>(expert - o.first_expert);
    const bool is_here = from_first < static_cast<unsigned>(o.end_expert - o.first_expert);
    return {piece.slot, piece.begin, is_here ? piece.count : 0};
  }
  __device__ __forceinline__ Span span_at(int row) const {
    return span_of({row / LoraGroupedTables::kRowTileRows});
  }
  __device__ __forceinline__ static void begin(Cursor& cursor, int row) {
    cursor.tile = row / LoraGroupedTables::kRowTileRows;
  }
  template <class Params>
  __device__ __forceinline__ static int main_steps(const Params& p, const Span& span) {
    return span.has_products() ? (p.k + 63) / 64 : 0;
  }
  template <class Params>
  __device__ __forceinline__ const T* q(const Params&, const Span& span) const {
    return p.q + (span.weight - o.first_expert) * o.q_stride;
  }
  template <class Epilogue, class Params>
  __device__ __forceinline__ Epilogue epilogue(const Params&, const Span& span, const Rows&) const {
    return {p, {o.y_rows, p.m}, {o.mask_rows, p.m}, span.begin + span.count, bias_of(span)};
  }
  __device__ __forceinline__ const void* bias_of(const Span& span) const {
    if (p.bias == nullptr || !span.has_products()) return nullptr;
    const int64_t bytes = p.float_bias ? sizeof(float) : sizeof(T);
    return static_cast<const unsigned char*>(p.bias) + span.weight * o.bias_stride * bytes;
  }

  // The low-rank product: its depth, whose last term has no zeros up to the width, and in steps.
  __device__ __forceinline__ int depth() const {
    return (p.terms == kMaxLowRankTerms ? last_term() : 0) + p.rank;
  }
  __device__ __forceinline__ int last_term() const {
    if constexpr (kWholeSteps) return (2 * o.width + 63) / 64 * 64;
    return 2 * o.width;
  }
  template <class Params>
  __device__ __forceinline__ static int parts(const Params&) {
    return 1;
  }
  template <class Params>
  __device__ __forceinline__ int steps(const Params&, const Cursor& cursor) const {
    return span_of(cursor).has_products() ? (depth() + 63) / 64 : 0;
  }

  template <class Loads>
  __device__ __forceinline__ static constexpr bool any_stride(const Loads& loads) {
    return Loads::TileOf::kN == 64 && !loads.p.whole_chunks;
  }
  template <class Loads>
  __device__ __forceinline__ static bool copies_apart(const Loads& loads) {
    return loads.low_rank || any_stride(loads);
  }
  template <class Loads>
  __device__ __forceinline__ static void begin_part(Loads&, int /*part*/) {}
  template <class Loads>
  __device__ __forceinline__ void copy_step(Loads& loads) const {
    if (!copies_apart(loads)) return loads.copy_step();
    if (loads.low_rank)
      return load(loads, loads.raster.place_of(loads.tile),
                  (steps(p, loads.cursor) - loads.steps--) * 64);
    // Past the last tile: zeros, as the last step loads fragments of the stage behind it, too.
    LoraGemmPlace at{};
    int k0 = p.k;
    const T* of_expert = p.q;
    if (loads.steps != INT_MAX) {
      const Span span = span_of(loads.cursor);
      at = loads.raster.place_of(loads.tile), of_expert = q(p, span);
      k0 = (main_steps(p, span) - loads.steps--) * 64;
    }
    load_elements(loads, at, k0, of_expert);
  }

  // Where T and U have a row or column of the depth.
  struct Ranks {
    int in_term;  // rank and more: zeros
    bool of_lo_in_t, of_lo_in_u;
  };
  __device__ __forceinline__ Ranks ranks_at(int depth) const {
    if (p.terms != kMaxLowRankTerms) return {depth, false, false};
    const int term = static_cast<int>(depth >= o.width) + static_cast<int>(depth >= last_term());
    int before = term * o.width;
    if constexpr (kWholeSteps) before += term / 2 * (last_term() - 2 * o.width);
    return {depth - before, term == 0, term == 1};
  }

  // Loads 64 of the depth of T and U.
  template <class Loads>
  __device__ __forceinline__ void load(Loads& loads, const LoraGemmPlace& at, int k0) const {
    using Tile = typename Loads::TileOf;
    static_assert(Tile::kM == LoraGroupedTables::kRowTileRows && Tile::kK == 64);
    const TileCopy<T, Tile::kThreads, Alignment::kVector> copy{loads.shared};
    const Span span = span_of(loads.cursor);
    const T* t = p.low_rank[0].t;
    const T* u = p.low_rank[0].u + o.row_tiles[loads.cursor.tile].adapter * o.u_stride;
    const uint32_t right = loads.stage + Tile::kLeftBytes;
    const int thread = static_cast<int>(threadIdx.x), chunk = thread % 8;
    const Ranks ranks = ranks_at(k0 + chunk * 8);
    const int of_t = ranks.in_term + (ranks.of_lo_in_t ? o.width : 0);
    const int of_u = ranks.in_term + (ranks.of_lo_in_u ? o.width : 0);
    const int left = p.rank - ranks.in_term;  // within the term
#pragma unroll 1  // unrolled, the addresses of each chunk would stay in registers throughout
    for (int row = thread / 8; row < Tile::kM; row += Tile::kThreads / 8)
      copy.copy_chunk(loads.stage + row_chunk_offset(row, chunk),
                      {t, p.t_pitch, span.begin + span.count, of_t + left}, span.begin + row, of_t);
    if constexpr (kUMNMajor) {
      constexpr int kChunks = Tile::kN / 8;
#pragma unroll 1
      for (int index = thread; index < 64 * kChunks; index += Tile::kThreads) {
        const int row = index / kChunks, in_row = index % kChunks;
        const Ranks of_row = ranks_at(k0 + row);
        copy.copy_chunk(right + panel_chunk_offset<64>(row, in_row),
                        {u + (of_row.of_lo_in_u ? o.width * p.u_pitch : 0), p.u_pitch, p.rank, p.n},
                        of_row.in_term, at.column + in_row * 8);
      }
    } else {
#pragma unroll 1
      for (int row = thread / 8; row < Tile::kN; row += Tile::kThreads / 8)
        copy.copy_chunk(right + row_chunk_offset(row, chunk), {u, p.u_pitch, p.n, of_u + left},
                        at.column + row, of_u);
    }
  }

  // Loads 64 along k of P and of an expert's Q, element by element.
  template <class Loads>
  __device__ __forceinline__ void load_elements(Loads& loads, const LoraGemmPlace& at, int k0,
                                                const T* of_expert) const {
    using Tile = typename Loads::TileOf;
    const TileCopy<T, Tile::kThreads, Alignment::kElement> copy{loads.shared};
    const Span span = span_of(loads.cursor);
    const uint32_t right = loads.stage + Tile::kLeftBytes;
    copy.template copy_rows<Tile::kM, 64>(
        loads.stage, {p.p, p.p_pitch, INT_MAX, p.k}, k0,
        [&](int row) { return row < span.count ? rows(span.begin + row) : INT_MAX; });
    if constexpr (kMNMajor) {
      copy.template copy_tile<64, Tile::kN>(right, {of_expert, p.q_pitch, p.k, p.n}, k0, at.column);
    } else {
      copy.template copy_tile<Tile::kN, 64>(right, {of_expert, p.q_pitch, p.n, p.k}, at.column, k0);
    }
  }

  // T U of a tile. The sum is scaled for the terms with lo, which end at whole 16 of the depth.
  template <class Gemm>
  __device__ __forceinline__ void multiply(const Gemm& gemm, typename Gemm::Accumulators& acc,
                                           typename Gemm::Walk& walk, typename Gemm::Loads& loads,
                                           const Span& span) const {
    if (!span.has_products()) return;
    const LoraGemmWarp<T, typename Gemm::TileOf, kUMNMajor> warp{};
    gemm.template scale_for_lo<true>(acc, 0);
#pragma unroll 1
    for (int k0 = 0; k0 < depth(); k0 += 64) {
#pragma unroll 1
      for (int k16 = 0; k16 < min((depth() - k0 + 15) / 16, 4); ++k16) {
        if (k0 + k16 * 16 == 2 * o.width)
          gemm.template scale_for_lo<false>(acc, kMaxLowRankTerms - 1);
        typename decltype(warp)::Fragments fragments;
        warp.load(fragments, walk.stage, k16);
        warp.multiply(acc, fragments);
      }
      gemm.finish_step(walk, loads);
      loads.step();
    }
  }
};

// As plan::has_experts_kernel says: on compute capability 9.0 ptxas spills with the larger tiles.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ == 900
template <class Tile>
constexpr bool has_own_weights_code = std::is_same_v<Tile, LoraGemmTile128x64>;
#else
template <class Tile>
constexpr bool has_own_weights_code = true;
#endif

template <class T, class Tile, bool kMNMajor, bool kUMNMajor, bool kMasked>
__global__ void __launch_bounds__(Tile::kThreads)
    lora_grouped_gemm_own_weights_sm80(const __grid_constant__ LoraOwnWeightsParams<T> p) {
  using Adapters = OwnWeights<T, kMNMajor, kUMNMajor>;
  if constexpr (has_own_weights_code<Tile>)
    LoraGemmSm80<T, Tile, kMNMajor, kMasked, Adapters>{p.gemm, Adapters{p}}.run();
}

}  // namespace lora_ext::kernel
