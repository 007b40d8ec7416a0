// Adds T B^T to the accumulators of a tile of Y.
//
// In each 16 x 8 block of accumulators, lane l holds rows l / 4 and l / 4 + 8 (rows of W or A) and
// columns 2 (l % 4) and 2 (l % 4) + 1 (rows of the batch).
#pragma once
#include "kernels/decode/table.h"
#include "kernels/tile/halves.h"
#include "ptx/mma.h"

namespace lora_ext::kernel {

// F is the type of the factors, float or T.
template <class T, class F, class Tile>
struct LoraDecodeLowRank {
  static constexpr bool kSplit = std::is_same_v<F, float>;
  using Accumulators = float[Tile::kBlocks][4];

  const LoraDecodeParams<T>& p;
  const LoraDecodeTable<Tile>& table;
  const int lane = threadIdx.x % 32;

  __device__ __forceinline__ static void clear(Accumulators& acc) {
#pragma unroll
    for (int i = 0; i < Tile::kBlocks * 4; ++i) acc[i / 4][i % 4] = 0.f;
  }
  // The batch row of a lane's element.
  __device__ __forceinline__ int row_of(int j, int e) const { return j * 8 + lane % 4 * 2 + e % 2; }

  // 16 ranks of an adapter's B as loaded: two neighbouring elements for each register of an
  // mma.sync. Converted to halves after all loads are issued, since that waits for the loads.
  using Pair = std::conditional_t<kSplit, uint64_t, uint32_t>;
  struct Piece {
    int number, column;
    Pair b[4];
  };
  // Several loads are in flight at once: one by one, each would take a round trip through L2 or, as
  // nothing has read B before, through DRAM. A batch has up to as many adapters as rows. With
  // floats and the largest batch there are registers for one.
  static constexpr int kPieces = !kSplit ? 4 : Tile::kBlocks < 8 ? 2 : 1;

  // Loads two neighbouring elements of a row of B; zero past its rows or the rank.
  __device__ __forceinline__ Pair load_pair(const LoraGroupedEntry& entry, int rank, int row,
                                            int column) const {
    if (row >= p.n || column >= rank) return 0;
    const F* from = static_cast<const F*>(entry.b) + row * entry.b_pitch + column;
    const auto rows_apart = static_cast<uintptr_t>(entry.b_pitch) * sizeof(F);
    const uintptr_t places = reinterpret_cast<uintptr_t>(entry.b) | rows_apart;
    if (places % sizeof(Pair) == 0 && column + 1 < rank)
      return *reinterpret_cast<const Pair*>(from);
    F pair[2] = {from[0], F(0.f)};
    if (column + 1 < rank) pair[1] = from[1];
    Pair both;
    memcpy(&both, pair, sizeof both);
    return both;
  }
  __device__ __forceinline__ void load_piece(Piece& piece, int row) const {
    const LoraDecodeAdapter& own = table.adapters[piece.number];
    const LoraGroupedEntry entry = decode_entry<F>(p, own.adapter);
    const int column = piece.column + lane % 4 * 2;
#pragma unroll
    for (int i = 0; i < 4; ++i)
      piece.b[i] = load_pair(entry, own.rank, row + i % 2 * 8, column + i / 2 * 8);
  }
  // As halves: a float as hi and lo, a half as itself.
  __device__ __forceinline__ static void split_pair(uint32_t& hi, uint32_t& lo, Pair both) {
    if constexpr (kSplit) {
      float pair[2];
      memcpy(pair, &both, sizeof pair);
      const T high[2] = {high_half<T>(pair[0]), high_half<T>(pair[1])};
      const T low[2] = {low_half<T>(pair[0]), low_half<T>(pair[1])};
      memcpy(&hi, high, sizeof hi);
      memcpy(&lo, low, sizeof lo);
    } else {
      hi = both, lo = 0;
    }
  }
  // Loads T for rows that take the adapter; T of other rows may not have these columns.
  __device__ __forceinline__ void load_t(uint32_t (&b)[2], int j, int number, int column) const {
    const int row = j * 8 + lane / 4;
    b[0] = b[1] = 0;
    if (table.number_of[row] != number) return;
    const T* t = p.t + static_cast<int64_t>(row) * p.t_pitch + column;
    b[0] = *reinterpret_cast<const uint32_t*>(t);
    b[1] = *reinterpret_cast<const uint32_t*>(t + 8);
  }

  // T B^T of one adapter and at most 32 rows, which is what registers allow: B hi T hi, and, scaled
  // by kLoScale, B hi T lo and B lo T hi.
  static constexpr int kTogether = Tile::kBlocks < 4 ? Tile::kBlocks : 4;
  struct Sums {
    float hi[kTogether][4], lo[kSplit ? kTogether : 1][4];

    __device__ __forceinline__ void clear() {
#pragma unroll
      for (int i = 0; i < kTogether * 4; ++i) {
        hi[i / 4][i % 4] = 0.f;
        if constexpr (kSplit) lo[i / 4][i % 4] = 0.f;
      }
    }
  };
  // Which of the batch's blocks from j0 on have a row with this adapter.
  __device__ __forceinline__ uint32_t rows_from(int j0, int number) const {
    return table.adapters[number].of_batch >> j0 & ((1u << kTogether) - 1);
  }
  __device__ __forceinline__ void multiply(Sums& low, const Piece& piece, int j0) const {
    const uint32_t rows = rows_from(j0, piece.number);
    const int column = piece.column + lane % 4 * 2;
    uint32_t t[kTogether][2];
    [[maybe_unused]] uint32_t t_lo[kTogether][2];
#pragma unroll
    for (int j = 0; j < kTogether; ++j) {
      if ((rows >> j & 1) == 0) continue;
      load_t(t[j], j0 + j, piece.number, column);
      if constexpr (kSplit) load_t(t_lo[j], j0 + j, piece.number, column + p.width);
    }
    uint32_t hi[4], lo[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) split_pair(hi[i], lo[i], piece.b[i]);
#pragma unroll
    for (int j = 0; j < kTogether; ++j) {
      if ((rows >> j & 1) == 0) continue;
      ptx::mma_m16n8k16<T>(low.hi[j], hi, t[j]);
      if constexpr (kSplit) {
        ptx::mma_m16n8k16<T>(low.lo[j], hi, t_lo[j]);
        ptx::mma_m16n8k16<T>(low.lo[j], lo, t[j]);
      }
    }
  }
  // Adds to the rows with that adapter only: a NaN in one adapter must not reach rows of another.
  __device__ __forceinline__ void add_to_rows(Accumulators& acc, const Sums& low, int number,
                                              int j0) const {
#pragma unroll
    for (int j = 0; j < kTogether; ++j) {
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        if (table.number_of[row_of(j0 + j, e)] != number) continue;
        acc[j0 + j][e] += low.hi[j][e];
        if constexpr (kSplit) acc[j0 + j][e] += low.lo[j][e] * (1.f / kLoScale<T>);
      }
    }
  }

  // The next adapter that has rows in this part of the batch.
  __device__ __forceinline__ int next_number(int number, int j0) const {
    while (number < table.count && rows_from(j0, number) == 0) ++number;
    return number;
  }
  // One adapter after the other, 16 ranks at a time.
  __device__ __forceinline__ void add(Accumulators& acc, int row) const {
#pragma unroll
    for (int j0 = 0; j0 < Tile::kBlocks; j0 += kTogether) {
      Sums low;
      int number = next_number(0, j0), column = 0;
      while (number < table.count) {
        Piece pieces[kPieces];
#pragma unroll
        for (int i = 0; i < kPieces; ++i) {
          pieces[i].number = number, pieces[i].column = column;
          if (number == table.count) continue;
          load_piece(pieces[i], row);
          column += 16;
          if (column >= table.adapters[number].rank)
            number = next_number(number + 1, j0), column = 0;
        }
#pragma unroll
        for (int i = 0; i < kPieces; ++i) {
          const Piece& piece = pieces[i];
          if (piece.number == table.count) break;
          if (piece.column == 0) low.clear();
          multiply(low, piece, j0);
          const bool is_last = piece.column + 16 >= table.adapters[piece.number].rank;
          if (is_last) add_to_rows(acc, low, piece.number, j0);
        }
      }
    }
  }
};

}  // namespace lora_ext::kernel
