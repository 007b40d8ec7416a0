// lora_gemm on wgmma and TMA (sm_90a).
//
//   global --TMA, half of Q multicast--> ring of stages --wgmma--> accumulators --slab, TMA--> Y
//
// Three warpgroups: a producer that loads, and two consumers that multiply and store. Blocks form
// clusters of two, one tile below the other, and are persistent: each cluster iterates over pairs
// of tiles, and loads run ahead of the products across the end of a tile.
//
//   pipeline.h     tiles, shared memory, barriers, ring, set-up and end of a block
//   load.h         the producer: what a stage receives
//   multiply.h     the consumers: the main loop
//   mask_ahead.h   dropout's bits, drawn while the tensor core works
//   store.h        the epilogue: bias, rounding, slabs
//   launch.h       from parameters to a launch
//
// Launched in clusters of Tile::kClusterSize (a launch attribute, so that the source compiles for
// every architecture). If T is written by the kernel before, it may be launched with PDL
// (programmatic dependent launch); without PDL griddepcontrol.wait returns at once.
#pragma once
#include "kernels/gemm/sm90a/load.h"
#include "kernels/gemm/sm90a/multiply.h"
#include "ptx/thread.h"

namespace lora_ext::kernel {

// Runs produce(warp) in the first warpgroup, and consume(0) and consume(1) in the others, to which
// setmaxnreg moves most of the producer's registers.
template <class Tile, class Produce, class Consume>
__device__ __forceinline__ void dispatch_role(const Produce& produce, const Consume& consume) {
  // Broadcast from lane 0, so that ptxas knows that the role is uniform in a warp.
  const int warp = __shfl_sync(0xffffffffu, static_cast<int>(threadIdx.x) / 32, 0);
  constexpr int kWarps = Tile::kWarpgroup / 32;
  if (warp < kWarps) {
    ptx::setmaxnreg_dec<Tile::kProducerRegisters>();
    produce(warp);
  } else {
    ptx::setmaxnreg_inc<Tile::kConsumerRegisters>();
    consume(warp / kWarps - 1);
  }
}

// Empty for other architectures, where it is never launched.
template <class T, class Tile, bool kMNMajor, bool kMasked, int kTail>
__global__ void __launch_bounds__(Tile::kThreads, 1)
    lora_gemm_sm90a(const __grid_constant__ LoraGemmMaps maps,
                    const __grid_constant__ LoraGemmParams<T> p) {
  static_assert(kMNMajor || !kMasked, "only dX is masked");
  if constexpr (ptx::kHasSm90a) {
    const LoraGemmSm90aBlock<T, Tile> block{maps, p};
    block.set_up();
    dispatch_role<Tile>(
        [&](int warp) {
          if (warp == 0 && ptx::elect_sync())
            LoraGemmSm90aProducer<T, Tile, kMNMajor, kMasked>{block}.produce();
        },
        [&](int consumer) {
          LoraGemmSm90aConsumer<T, Tile, kMNMajor, kMasked, kTail>{block, consumer}.consume();
        });
    block.sync_before_exit();
  }
}

}  // namespace lora_ext::kernel
