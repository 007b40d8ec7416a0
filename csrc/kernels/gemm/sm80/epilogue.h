// Epilogue of lora_gemm on mma.sync: the mask on the low-rank product, the bias, and the stores of
// Y's rows in 16-byte chunks through a slab of shared memory per warp. Rows of a base are loaded
// the same way.
//
// In each 16 x 8 block, lane l holds rows l / 4 and l / 4 + 8, columns 2 (l % 4) and 2 (l % 4) + 1.
#pragma once
#include "kernels/gemm/params.h"
#include "kernels/tile/halves.h"
#include "kernels/tile/mask.h"
#include "ptx/thread.h"

namespace lora_ext::kernel {

// The bias added to the columns of Y, stored in float or in Y's type.
template <class T>
struct Bias {
  const void* data;  // [n], or null
  bool in_float;
  int n;

  // Returns the bias of two neighbouring columns in each of kBlocks blocks of 8 columns, in a
  // lane's layout of the accumulators of mma and wgmma; the first column is `column`. Returns 0 if
  // there is no bias, and past the last column.
  template <int kBlocks>
  __device__ __forceinline__ void load(float (&values)[kBlocks][2], int column) const {
    if (data == nullptr) {
#pragma unroll
      for (int i = 0; i < kBlocks; ++i) values[i][0] = values[i][1] = 0.f;
    } else if (in_float) {
      load_from(values, static_cast<const float*>(data), column);
    } else {
      load_from(values, static_cast<const T*>(data), column);
    }
  }

  template <int kBlocks, class Element>
  __device__ __forceinline__ void load_from(float (&values)[kBlocks][2], const Element* bias,
                                            int column) const {
#pragma unroll
    for (int i = 0; i < kBlocks; ++i) {
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        const int at = column + i * 8 + e;
        values[i][e] = at < n ? static_cast<float>(bias[at]) : 0.f;
      }
    }
  }
};

template <class T, class Tile, bool kAddsOntoBase, class Rows>
struct LoraGemmEpilogue {
  static constexpr int kRowBlocks = Tile::kWarpM / 16, kColumnBlocks = Tile::kWarpN / 8;
  using Accumulators = float[kRowBlocks][kColumnBlocks][4];

  const LoraGemmParams<T>& p;
  const Rows row_at{}, mask_row_at = row_at;  // of Y, and of its mask
  const int end = p.m;                        // of the tile's rows
  const void* const bias_data = p.bias;
  const int lane = threadIdx.x % 32;

  // Dropout bits of the warp's tile, in shares of 8 elements (tile/mask.h): the shares of a row,
  // for rows 0 and 8 of each 16, one below the other.
  static constexpr int kSharesOfRow = kColumnBlocks / 4, kShares = kRowBlocks * 2 * kSharesOfRow;
  struct Kept {
    uint32_t words[kShares / 4];
  };
  static_assert(kShares % 4 == 0);

  // Draws the bits of the warp's tile that begins at (row0, column0).
  __device__ __forceinline__ Kept draw(int row0, int column0) const {
    const MaskShares shares{p.mask};
    Kept kept{};
#pragma unroll 1
    for (int share = 0; share < kShares; ++share) {
      const int row = row0 + share / kSharesOfRow * 8 + lane / 4;
      const int column = column0 + share % kSharesOfRow * 32 + lane % 4 * 2;
      push(kept, shares.draw(mask_row_at(row), column));
    }
    return kept;
  }
  // Used as a queue, so that no register is indexed at run time: the first share ends up in the
  // highest bits.
  __device__ __forceinline__ static void push(Kept& kept, uint32_t share) {
    constexpr int kLast = kShares / 4 - 1;
#pragma unroll
    for (int i = 0; i < kLast; ++i) kept.words[i] = kept.words[i] << 8 | kept.words[i + 1] >> 24;
    kept.words[kLast] = kept.words[kLast] << 8 | share;
  }

  // mask * accumulators, which hold only T U at this point.
  __device__ __forceinline__ void mask(Accumulators& acc, const Kept& kept) const {
#pragma unroll
    for (int share = 0; share < kShares; ++share) {
      const int of_rows = share / kSharesOfRow, first = share % kSharesOfRow * 4;
#pragma unroll
      for (int i = 0; i < 8; ++i) {
        float& value = acc[of_rows / 2][first + i / 2][of_rows % 2 * 2 + i % 2];
        const bool keeps = kept.words[share / 4] >> (31 - share % 4 * 8 - i) & 1;
        value = keeps ? value * p.mask.keep_scale : 0.f;
      }
    }
  }

  // Copies eight elements of a row, of which `left` are within Y.
  __device__ __forceinline__ void copy_chunk(T* to, const T* from, int left) const {
    // Wider tiles have k > 0. Testing this for them would spill registers on 9.0.
    const bool whole_chunks = Tile::kN > 64 || p.whole_chunks;
    if (whole_chunks && left >= 8) {
      *reinterpret_cast<uint4*>(to) = *reinterpret_cast<const uint4*>(from);
    } else {
#pragma unroll
      for (int i = 0; i < 8; ++i)
        if (i < left) to[i] = from[i];
    }
  }

  // Calls move(chunk of the slab, row, column, elements within Y) for the chunks of 16 rows.
  template <class Move>
  __device__ __forceinline__ void for_chunks(unsigned char* slab, int row0, int column0,
                                             const Move& move) const {
    constexpr int kChunks = Tile::kSlabColumns / 8;
#pragma unroll
    for (int chunk = 0; chunk < 16 * kChunks / 32; ++chunk) {
      const int index = chunk * 32 + lane;
      const int in_row = index / kChunks, in_column = index % kChunks * 8;
      const int row = row0 + in_row, column = column0 + in_column, left = p.n - column;
      if (row >= end || left <= 0) continue;
      move(reinterpret_cast<T*>(slab + in_row * Tile::kSlabPitch + in_column * 2), row_at(row),
           column, left);
    }
  }

  // Adds two neighbouring elements of a row of the base, of which `left` are within it.
  __device__ __forceinline__ static void add_base(float (&sums)[2], const unsigned char* base,
                                                  int left) {
    const T* two = reinterpret_cast<const T*>(base);
#pragma unroll
    for (int e = 0; e < 2; ++e)
      if (e < left) sums[e] += static_cast<float>(two[e]);
  }

  // Stores the warp's part of Y, a slab at a time.
  __device__ __forceinline__ void store(const Accumulators& acc, int row0, int column0) const {
    const Bias<T> bias{bias_data, p.float_bias, p.n};
    float of_columns[kColumnBlocks][2];
    bias.load(of_columns, column0 + lane % 4 * 2);
    constexpr int kBlocks = Tile::kSlabColumns / 8;
#pragma unroll
    for (int i = 0; i < kRowBlocks; ++i) {
#pragma unroll
      for (int j = 0; j < kColumnBlocks; j += kBlocks)
        store_slab<kBlocks>(&acc[i][j], &of_columns[j], row0 + i * 16, column0 + j * 8);
    }
  }

  template <int kBlocks>
  __device__ __forceinline__ void store_slab(const float (*acc)[4], const float (*bias)[2],
                                             int row0, int column0) const {
    unsigned char* slab = ptx::dynamic_shared_memory() + Tile::kSlabs +
                          static_cast<int>(threadIdx.x) / 32 * 16 * Tile::kSlabPitch;
    __syncwarp();
    const bool onto_base = kAddsOntoBase && p.base != nullptr;
    if (onto_base) {
      for_chunks(slab, row0, column0, [&](T* chunk, int row, int column, int left) {
        copy_chunk(chunk, p.base + static_cast<int64_t>(row) * p.base_pitch + column, left);
      });
      __syncwarp();
    }
#pragma unroll
    for (int j = 0; j < kBlocks; ++j) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int row = half * 8 + lane / 4, column = j * 8 + lane % 4 * 2;
        unsigned char* to = slab + row * Tile::kSlabPitch + column * 2;
        float sums[2] = {acc[j][half * 2] + bias[j][0], acc[j][half * 2 + 1] + bias[j][1]};
        if (onto_base && row0 + row < p.m) add_base(sums, to, p.n - column0 - column);
        *reinterpret_cast<uint32_t*>(to) = rounded_pair<T>(sums[0], sums[1]);
      }
    }
    __syncwarp();
    for_chunks(slab, row0, column0, [&](T* chunk, int row, int column, int left) {
      copy_chunk(p.y + static_cast<int64_t>(row) * p.y_pitch + column, chunk, left);
    });
  }
};

}  // namespace lora_ext::kernel
