// A consumer warpgroup of lora_gemm on sm_90a: from full stages through the tensor core to the
// accumulators of one tile, or of its 64 rows of the tile.
//
//   consume()    its tiles, one after the other
//   compute()    one tile: the steps of P Q and of T U
//   step()       one stage: wait until it is full, multiply, release the stage before
//   multiply()   the wgmmas of a stage
//   release()    signals both producers that a stage may be filled again
//
// wgmma is asynchronous: while the products of a step are in flight, the step waits for those of
// the step before, and only then releases their stage. In between nothing touches the accumulators
// (PTX ISA, wgmma.fence), which are pinned on both sides, or ptxas would make every wgmma wait for
// the one before.
#pragma once
#include "kernels/gemm/sm90a/mask_ahead.h"
#include "kernels/gemm/sm90a/store.h"
#include "kernels/tile/halves.h"
#include "ptx/wgmma.h"

namespace lora_ext::kernel {

// kTail: the number of wgmmas, of 16 along k each, in the last step of T U; the other 64 - 16 kTail
// of its 64 would only multiply zeros. A constant, since ptxas cannot pipeline a number known at
// run time (C7519).
template <class T, class Tile, bool kMNMajor, bool kMasked, int kTail>
struct LoraGemmSm90aConsumer {
  using Block = LoraGemmSm90aBlock<T, Tile>;
  using Epilogue = LoraGemmSm90aEpilogue<T, Tile>;
  using Accumulators = typename Epilogue::Accumulators;
  using Ring = typename Block::Ring;
  using Place = typename Block::Place;
  static constexpr int kAll = Tile::kK / 16;

  const Block& block;
  const int consumer;  // 0 or 1
  const int lane = threadIdx.x % 32;
  const Epilogue epilogue{block.maps, block.p, consumer};

  struct NoMask {};
  using MaskAhead = std::conditional_t<kMasked, LoraGemmSm90aMaskAhead<T, Tile>, NoMask>;

  __device__ __forceinline__ MaskAhead mask_ahead() const {
    if constexpr (!kMasked) {
      return {};
    } else {
      return {block, epilogue.first_row({0, 0}, 0) + lane / 4, lane % 4 * 2};
    }
  }

  // The state of a tile's main loop.
  struct Progress {
    Ring ring;
    int held = -1;  // the stage that wgmmas in flight may still read
    bool accumulate = false;
  };

  __device__ __forceinline__ void consume() const {
    Ring ring;
    int tile = block.first_tile, stride = block.tile_stride;
    if constexpr (Tile::kPingpong) {
      tile += consumer * stride;
      ring.skip(consumer * block.steps);
      stride *= Tile::kConsumers;
    }
    MaskAhead ahead = mask_ahead();
    for (; tile < block.tiles; tile += stride) {
      Accumulators acc;
      const Place at = compute(acc, ring, tile, tile + stride, ahead);
      epilogue.store(acc, at);
      if constexpr (Tile::kPingpong) ring.skip(block.steps);
    }
    epilogue.drain();
  }

  // Computes a tile and returns its position; `next` is the tile whose mask is drawn meanwhile.
  // Work that needs no accumulators is done while products are in flight.
  __device__ __forceinline__ Place compute(Accumulators& acc, Ring& ring, int tile, int next,
                                           MaskAhead& ahead) const {
    Progress now{ring};
    if constexpr (kMasked) ahead.finish(tile);
    if constexpr (Tile::kPingpong) wait_for_turn(tile);
    if constexpr (kMasked) {  // T U first: only T U is masked
      multiply_low_rank(acc, now);
      wait_for_products(acc);
      ahead.apply(acc);
    }
    if constexpr (kMasked && !Tile::kPingpong) {
      const int then = min(next, block.tiles - 1);  // any valid tile, at the end
      multiply_main(acc, now, [&] { ahead.draw_in_step(then); });
    } else {
      multiply_main(acc, now);
    }
    const Place at = block.place_of(tile);
    const auto bias = epilogue.bias.load(at.column);
    if constexpr (!kMasked) multiply_low_rank(acc, now);
    if constexpr (Tile::kPingpong) pass_turn(tile);
    epilogue.put_bias(bias);
    finish(acc, ring, now);
    return at;
  }

  struct Nothing {
    __device__ __forceinline__ void operator()() const {}
  };

  // meanwhile() runs beside each step's products.
  template <class Meanwhile = Nothing>
  __device__ __forceinline__ void multiply_main(Accumulators& acc, Progress& now,
                                                const Meanwhile& meanwhile = Meanwhile()) const {
    const int steps = block.main_steps;
    for (int i = 0; i < steps; ++i) step<kAll>(acc, now, meanwhile);
  }

  __device__ __forceinline__ void multiply_low_rank(Accumulators& acc, Progress& now) const {
    const int terms = block.p.terms, whole = block.steps_per_term - 1;
    for (int term = 0; term < terms; ++term) {
      scale_for_lo(acc, now, term);
      for (int i = 0; i < whole; ++i) step<kAll>(acc, now);
      step<kTail>(acc, now);
    }
  }

  // The terms with lo, which is stored scaled by kLoScale, come before hi hi: the sum is scaled
  // before and after them. The scales are powers of two, hence exact.
  __device__ __forceinline__ void scale_for_lo(Accumulators& acc, const Progress& now,
                                               int term) const {
    if constexpr (kLoScale<T> != 1.f) {
      const bool enter = term == 0 && now.accumulate;
      const bool leave = term == kMaxLowRankTerms - 1;
      if (block.p.terms == kMaxLowRankTerms && (enter || leave)) {
        wait_for_products(acc);
        const float factor = enter ? kLoScale<T> : 1.f / kLoScale<T>;
#pragma unroll
        for (int i = 0; i < Tile::kRowBlocks; ++i) {
#pragma unroll
          for (int e = 0; e < Tile::kN / 2; ++e) acc[i][e] *= factor;
        }
      }
    }
  }

  // Multiplies one stage, kSteps times 16 along k.
  template <int kSteps, bool kRightMNMajor = kMNMajor, class Meanwhile = Nothing>
  __device__ __forceinline__ void step(Accumulators& acc, Progress& now,
                                       const Meanwhile& meanwhile = Meanwhile()) const {
    ptx::mbarrier_wait(block.full(now.ring.slot), now.ring.parity);
    multiply<kSteps, kRightMNMajor>(acc, now);
    meanwhile();
    ptx::wgmma_wait_group<1>();  // this step's group goes on, the one before has ended
    if (now.held >= 0) release(now.held);
    now.held = now.ring.slot;
    now.ring.advance();
  }

  // The wgmmas of a stage, whose rows are 128 bytes. K-major: 16 along k are 32 bytes of a row, and
  // groups of eight rows are 1024 bytes apart. MN-major: 16 along k are 16 rows of each panel.
  template <int kSteps, bool kRightMNMajor>
  __device__ __forceinline__ void multiply(Accumulators& acc, Progress& now) const {
    constexpr ptx::Major kMajor = kRightMNMajor ? ptx::Major::kMN : ptx::Major::kK;
    constexpr uint32_t kGroup = 8 * Tile::kRowBytes, kAlongRow = 32;
    constexpr uint32_t kAlongRight = kRightMNMajor ? 16 * Tile::kRowBytes : kAlongRow;
    constexpr uint32_t kPanels = kRightMNMajor ? Tile::kPanelBytes : 16;  // K-major: not used
    const uint32_t left = block.left(now.ring.slot) +
                          static_cast<uint32_t>(consumer * Tile::kRowsApart) * Tile::kRowBytes;
    const uint32_t right = block.right(now.ring.slot);
    pin(acc);
    ptx::wgmma_fence();
#pragma unroll
    for (int k16 = 0; k16 < kSteps; ++k16) {
      const uint64_t b =
          ptx::matrix_descriptor(right + k16 * kAlongRight, kPanels, kGroup, ptx::Swizzle::k128);
#pragma unroll
      for (int i = 0; i < Tile::kRowBlocks; ++i) {
        const uint64_t a = ptx::matrix_descriptor(left + i * 64 * Tile::kRowBytes + k16 * kAlongRow,
                                                  16, kGroup, ptx::Swizzle::k128);
        ptx::wgmma_ss<T, Tile::kN, ptx::Major::kK, kMajor>(acc[i], a, b, now.accumulate || k16 > 0);
      }
    }
    ptx::wgmma_commit_group();
    now.accumulate = true;
  }

  __device__ __forceinline__ void pin(Accumulators& acc) const {
#pragma unroll
    for (int i = 0; i < Tile::kRowBlocks; ++i) ptx::wgmma_pin(acc[i]);
  }

  // Afterwards the accumulators may be read and written.
  __device__ __forceinline__ void wait_for_products(Accumulators& acc) const {
    ptx::wgmma_wait_group<0>();
    pin(acc);
  }

  // The end of a product, which has at least one step.
  __device__ __forceinline__ void finish(Accumulators& acc, Ring& ring, const Progress& now) const {
    wait_for_products(acc);
    release(now.held);
    ring = now.ring;
  }

  // Once per warp, for both blocks, since either's producer multicasts into the stage. Only wgmma
  // has read it, so no release of cluster scope, a memory barrier in the main loop, is needed.
  __device__ __forceinline__ void release(int slot) const {
    constexpr int kBlocks = Tile::kClusterSize;
    if (lane < kBlocks) ptx::mbarrier_arrive_remote(block.empty(slot), static_cast<uint32_t>(lane));
  }

  // Pingpong: the consumers use the tensor core alternately, tile by tile. Otherwise the second
  // would wait for phases more than one pass of the ring ahead, where the parity is ambiguous.
  static constexpr uint32_t kTurnBarrier = 1 + Tile::kConsumers;
  static constexpr uint32_t kTurnThreads = Tile::kConsumers * Tile::kWarpgroup;

  __device__ __forceinline__ void wait_for_turn(int tile) const {
    if (tile >= block.tile_stride)
      ptx::bar_sync(kTurnBarrier + static_cast<uint32_t>(consumer), kTurnThreads);
  }
  __device__ __forceinline__ void pass_turn(int tile) const {
    if (tile + block.tile_stride < block.tiles)
      ptx::bar_arrive(kTurnBarrier + static_cast<uint32_t>(1 - consumer), kTurnThreads);
  }
};

}  // namespace lora_ext::kernel
