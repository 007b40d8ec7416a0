// lora_gemm: the LoRA linear's large product with the low-rank product in the same accumulators.
//
//     Y = P Q + mask * (T U) + bias
//
//     forward   Y  = X W^T + s S B^T + bias     P = X,  Q = W^T, T = s S, U = B^T
//     dX        dX = dY W + mask * (dS A)       P = dY, Q = W,   T = dS,  U = A
//
// Q and U are K-major, [N, K] and [N, rank] (forward: the linear layer's own W and B), or MN-major,
// [K, N] and [rank, N] (dX: the same W, and A). Without a mask the low-rank product is the last
// steps along k of the same main loop. With a mask it comes first, is masked in the accumulators,
// and the loop over P Q accumulates onto it: mask * (T U) is never stored.
//
// With k = 0, P and Q may be null: Y = mask * (T U) + bias, onto which the library accumulates P Q,
// or, where P Q was computed before, Y = base + T U.
//
// A factor in fp32 is two halves of T's type (halves.h), and T U has three terms: lo hi, hi lo, hi
// hi, in this order (lo lo is below fp32's rounding). Each term is a pair of T and U.
#pragma once

#include <cstdint>
#include <type_traits>

#include "kernels/tile/mask.h"

namespace lora_ext::kernel {

constexpr int kMaxLowRankTerms = 3;

// Pitches are in elements, from row to row. m, n, k and rank fit an int; offsets need not.
template <class T>
struct LoraGemmParams {
  const T* p;  // [m, k]
  const T* q;  // [n, k] or [k, n]
  struct {
    const T* t;  // [m, rank]
    const T* u;  // [n, rank] or [rank, n]
  } low_rank[kMaxLowRankTerms];
  const void* bias;  // [n], in float or T; may be null
  const T* base;     // [m, n], or null; only for kernels that add onto a base
  T* y;              // [m, n]; may be equal to base
  int64_t p_pitch, q_pitch, t_pitch, u_pitch, base_pitch, y_pitch;
  int m, n, k, rank, terms;
  bool float_bias;
  bool whole_chunks = true;  // rows of Y and base; required, for P and Q too, if k > 0
  bool trigger_dependents;   // on sm_90a: the next grid is lora_wgrad, launched with PDL

  Mask mask;  // of Y; only for masked kernels
};

// Rows in their original order: position = row of P and Y.
struct SameRows {
  static constexpr bool kInOrder = true;
  __device__ __forceinline__ int operator()(int position) const { return position; }
};

// A tile of Y, kM x kN, computed by kM / kWarpM x kN / kWarpN warps in steps of 64 along k.
template <int kM_, int kN_, int kWarpM_, int kWarpN_, int kStages_, int kSlabColumns_ = kWarpN_>
struct LoraGemmTile {
  static constexpr int kM = kM_, kN = kN_, kWarpM = kWarpM_, kWarpN = kWarpN_, kStages = kStages_;
  static constexpr int kK = 64;
  static constexpr int kWarps = (kM / kWarpM) * (kN / kWarpN);
  static constexpr int kThreads = 32 * kWarps;

  // Shared memory: the ring of stages, each a tile of P or T and one of Q or U; then a slab of 16
  // rows of kSlabColumns per warp, through which rows of Y are stored in whole 16-byte chunks. The
  // padding of 16 bytes per row puts the slab's rows in different banks.
  static constexpr uint32_t kLeftBytes = kM * kK * 2, kRightBytes = kN * kK * 2;
  static constexpr uint32_t kStageBytes = kLeftBytes + kRightBytes;
  static constexpr int kSlabColumns = kSlabColumns_;
  static constexpr uint32_t kSlabPitch = kSlabColumns * 2 + 16;
  static constexpr uint32_t kSlabs = kStages * kStageBytes;
  static constexpr uint32_t kSharedBytes = kSlabs + kWarps * 16 * kSlabPitch;

  static_assert(kM % kWarpM == 0 && kN % kWarpN == 0 && kWarpM % 16 == 0 && kWarpN % 32 == 0);
  static_assert(kM * 8 % kThreads == 0 && kN * 8 % kThreads == 0, "chunks of 16 bytes a thread");
  static_assert(kN % 64 == 0, "MN-major tiles are panels of 64 columns");
  static_assert(kWarpN % kSlabColumns == 0 && kSlabColumns % 16 == 0, "two chunks a row or more");
};

// Whether kernels can add onto a given base: only forward, on the tile for products without P Q.
template <class Tile, bool kMNMajor>
constexpr bool adds_onto_base = !kMNMajor && Tile::kN == 64;

using LoraGemmTile128x128 = LoraGemmTile<128, 128, 64, 64, 2>;  // 73 KiB: two blocks an SM of sm_80
using LoraGemmTile128x128Deep = LoraGemmTile<128, 128, 64, 64, 3, 16>;  // 99 KiB: sm_86, sm_89
using LoraGemmTile128x64 = LoraGemmTile<128, 64, 64, 32, 3>;  // 77 KiB: small problems, and k = 0
static_assert(2 * (LoraGemmTile128x128::kSharedBytes + 1024) <= 164 * 1024, "two on sm_80");
static_assert(LoraGemmTile128x128Deep::kSharedBytes <= 99 * 1024, "what sm_86 gives to a block");
static_assert(LoraGemmTile128x64::kSharedBytes <= 99 * 1024);

// Whether a tile's kernels have code for the architecture compiled for. On compute capability 9.0
// an SM has shared memory for two blocks, so no plan takes the deep tile there.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ == 900
template <class Tile>
constexpr bool has_code = !std::is_same_v<Tile, LoraGemmTile128x128Deep>;
#else
template <class Tile>
constexpr bool has_code = true;
#endif

}  // namespace lora_ext::kernel
