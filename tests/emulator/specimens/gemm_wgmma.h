// A clustered, warp-specialised GEMM for sm_90a with a low-rank term computed in the same grid
// (gemm_wgmma_plan.h says what).
//
//   warpgroup 0     warp 0: producer, TMA loads into a ring of four stages; W is multicast, half by
//   each block of the cluster
//                   warp 1: scheduler (block 0 of the cluster), draws jobs and hands them to both
//                   blocks
//   warpgroups 1-2  consumers: S = scale X Aᵀ with X from registers (wgmma RS), published through a
//   flag per row block;
//                   Y tiles from shared memory (wgmma SS), whose last k-step is S · B
//
// A cluster works through jobs until there are none, then reduces max |S| and leaves.
#pragma once
#include "emulator/specimens/gemm_wgmma_consumer.h"
#include "emulator/specimens/gemm_wgmma_producer.h"
#include "ptx/registers.h"

namespace specimens {

template <class T, ptx::Major kMajorW, class Fault = emulator::NoFault>
__global__ void __cluster_dims__(kClusterSize, 1, 1) __launch_bounds__(kThreads, 1)
    gemm_wgmma(const __grid_constant__ GemmWgmmaMaps maps,
               const __grid_constant__ GemmWgmmaParams p) {
  const GemmWgmmaBlock<Fault> block{maps, p};
  block.set_up();
  if (Fault::flag("role.producers", block.consumer < 0)) {
    if (Fault::swap("role.producer_keeps_more")) {
      ptx::setmaxnreg_dec<kProducerRegisters + 16>();
    } else if (!Fault::skip("role.producer_registers")) {
      ptx::setmaxnreg_dec<kProducerRegisters>();
    }
    const GemmWgmmaProducer<kMajorW, Fault> producer{block};
    if (Fault::flag("role.producer", threadIdx.x == 0)) producer.produce();
    if (Fault::flag("role.scheduler", block.rank == 0 && threadIdx.x == 32)) producer.schedule();
  } else {
    if (Fault::swap("role.consumer_takes_more")) {
      ptx::setmaxnreg_inc<kConsumerRegisters + 8>();
    } else {
      ptx::setmaxnreg_inc<kConsumerRegisters>();
    }
    const GemmWgmmaConsumer<T, kMajorW, Fault> consumer{block};
    consumer.consume();
  }
  block.finish();
}

// bias [n] = scale · raw [n]: the grid before gemm_wgmma, which may start while this one runs.
template <class Fault = emulator::NoFault>
__global__ void __launch_bounds__(128)
    prepare_bias(const float* raw, float scale, float* bias, int n) {
  if (!Fault::skip("prepare.lets_gemm_begin")) ptx::griddepcontrol_launch_dependents();
  const int i = static_cast<int>(blockIdx.x * 128 + threadIdx.x);
  if (Fault::flag("prepare.inside", i < Fault::count("prepare.columns", n, n - 1, n + 1))) {
    bias[i] = scale * raw[i];
  }
}

}  // namespace specimens
