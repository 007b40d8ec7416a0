// The warp tile of lora_gemm: kWarpM rows of P or T by kWarpN columns of Q or U, in fragments of 16
// along k loaded from a stage of shared memory.
#pragma once
#include "kernels/tile/copy.h"
#include "ptx/mma.h"

namespace lora_ext::kernel {

template <class T, class Tile, bool kMNMajor>
struct LoraGemmWarp {
  static constexpr int kRowBlocks = Tile::kWarpM / 16, kColumnBlocks = Tile::kWarpN / 8;
  static constexpr int kPairs = kColumnBlocks / 2;
  using Accumulators = float[kRowBlocks][kColumnBlocks][4];

  // Blocks of 16 x 16 of the left operand; of the right one pairs of blocks of 16 x 8.
  struct Fragments {
    uint32_t left[kRowBlocks][4], right[kPairs][4];
  };

  const uint32_t shared = ptx::shared_address(ptx::dynamic_shared_memory());
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int row = warp % (Tile::kM / Tile::kWarpM) * Tile::kWarpM;
  const int column = warp / (Tile::kM / Tile::kWarpM) * Tile::kWarpN;

  // The address that this lane gives to ldmatrix for the first block of a warp, at k16 = 0. For the
  // left operand, lanes 0..15 address the rows of the left half, 16..31 those of the right half.
  const uint32_t left_at = row_chunk_offset(row + lane % 16, lane / 16);
  const uint32_t right_at =
      Tile::kLeftBytes + (kMNMajor
                              ? panel_chunk_offset<Tile::kK>(lane % 16, column / 8 + lane / 16)
                              : row_chunk_offset(column + lane / 16 * 8 + lane % 8, lane / 8 % 2));

  // Blocks of 16 rows are 16 x 128 bytes apart, which is a period of the swizzle. Chunks of 16
  // columns differ in bits 5 and 6 of the offset, to which the swizzle is applied by XOR: so most
  // of an address is a constant of the instruction.
  static constexpr uint32_t kRowsApart = 16 * 128, kChunksApart = 32;
  __device__ __forceinline__ void load_left(uint32_t (&block)[4], uint32_t stage, int i,
                                            int k16) const {
    const auto rows = static_cast<uint32_t>(i), columns = static_cast<uint32_t>(k16);
    ptx::ldmatrix_x4(block,
                     shared + stage + (left_at ^ columns * kChunksApart) + rows * kRowsApart);
  }

  __device__ __forceinline__ void load_right(uint32_t (&pair)[4], uint32_t stage, int i,
                                             int k16) const {
    const auto rows = static_cast<uint32_t>(kMNMajor ? k16 : i);
    const auto columns = static_cast<uint32_t>(kMNMajor ? i : k16);
    const uint32_t at = shared + stage + (right_at ^ columns * kChunksApart) + rows * kRowsApart;
    if constexpr (kMNMajor) {
      ptx::ldmatrix_x4_trans(pair, at);
    } else {
      ptx::ldmatrix_x4(pair, at);
    }
  }

  __device__ __forceinline__ void load(Fragments& fragments, uint32_t stage, int k16) const {
#pragma unroll
    for (int i = 0; i < kPairs; ++i) load_right(fragments.right[i], stage, i, k16);
#pragma unroll
    for (int i = 0; i < kRowBlocks; ++i) load_left(fragments.left[i], stage, i, k16);
  }

  __device__ __forceinline__ void multiply_block(Accumulators& acc, const Fragments& fragments,
                                                 int i) const {
#pragma unroll
    for (int j = 0; j < kColumnBlocks; ++j) {
      const uint32_t (&pair)[4] = fragments.right[j / 2];
      ptx::mma_m16n8k16<T>(acc[i][j], fragments.left[i], {pair[j % 2 * 2], pair[j % 2 * 2 + 1]});
    }
  }
  __device__ __forceinline__ void multiply(Accumulators& acc, const Fragments& fragments) const {
#pragma unroll
    for (int i = 0; i < kRowBlocks; ++i) multiply_block(acc, fragments, i);
  }
};

}  // namespace lora_ext::kernel
