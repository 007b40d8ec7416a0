// Two reductions over a vector x [count], each finished across blocks in its own way:
//
//   ordered_sum  float sum in a fixed order, the same bits on every run. The part b of x is added
//   to the running total of
//                part b - 1, which is awaited through a release/acquire flag. Blocks draw their
//                parts in order.
//   sum_and_max  uint32 sum and maximum. Blocks leave partial results; the last one to finish, told
//   by an atomic
//                ticket, combines them.
//
// Inside a block: strided loads, a shuffle tree per warp, then shared memory.
#pragma once
#include "emulator/fault.h"
#include "ptx/barrier.h"
#include "ptx/fence.h"
#include "ptx/memory.h"
#include "ptx/thread.h"

namespace specimens {

namespace ptx = lora_ext::ptx;

constexpr int kReductionThreads = 256;
constexpr int kReductionWarps = kReductionThreads / 32;
constexpr int kReductionItems = 1024;  // elements in a part of ordered_sum

constexpr int ordered_sum_parts(int count) {
  return (count + kReductionItems - 1) / kReductionItems;
}

struct OrderedSumParams {
  const float* x;  // [count]
  int count;
  float* running;   // [parts], the sum over all parts up to this one; the last is the result
  uint32_t* ready;  // [parts], zero at launch; 1 once running[part] may be read
  uint32_t* next;   // [1], zero at launch: the next part to draw
};

struct OrderedSumShared {
  int part;
  float partials[kReductionWarps];
};

// Lane 0 gets the sum over the lanes [0, width), width a power of two.
__device__ __forceinline__ float warp_sum(float value, uint32_t mask, int width) {
  for (int offset = width / 2; offset > 0; offset /= 2) {
    value += __shfl_down_sync(mask, value, offset, width);
  }
  return value;
}

template <class Fault = emulator::NoFault>
__global__ void __launch_bounds__(kReductionThreads) ordered_sum(const OrderedSumParams p) {
  constexpr int kPartialsBarrier = 1;
  OrderedSumShared& shared = *reinterpret_cast<OrderedSumShared*>(ptx::dynamic_shared_memory());
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;

  // CUDA starts blocks in no particular order: numbered by the ticket they draw, a block only ever
  // waits for one that has started before it.
  if (Fault::flag("sum.drawer", threadIdx.x == 0)) {
    shared.part = static_cast<int>(ptx::atomic_add_relaxed_gpu(p.next, 1));
  }
  if (!Fault::skip("sum.part_drawn")) __syncthreads();
  const int part = shared.part;

  // Every thread: its elements, then the warp's sum to lane 0.
  const int first = part * kReductionItems;
  const int last = min(first + kReductionItems, p.count);
  float sum = 0.f;
  for (int i = first + static_cast<int>(threadIdx.x);
       i < Fault::count("sum.elements", last, last - 1, last + 1); i += kReductionThreads) {
    sum += p.x[i];
  }
  sum = warp_sum(sum, Fault::value("sum.warp_mask", 0xffffffffu, 0xffffu),
                 Fault::count("sum.warp_width", 32, 16, 64));
  if (Fault::flag("sum.partial_writer", lane == 0)) shared.partials[warp] = sum;

  // One-way barrier: the other warps only announce their partial sum and leave, warp 0 waits for
  // all.
  if (Fault::flag("sum.first_warp", warp == 0)) {
    if (!Fault::skip("sum.partials_sync")) {
      ptx::bar_sync(kPartialsBarrier, Fault::count("sum.sync_threads", kReductionThreads,
                                                   kReductionThreads - 32, kReductionThreads + 32));
    }
  } else {
    if (!Fault::skip("sum.partials_arrive")) {
      ptx::bar_arrive(kPartialsBarrier,
                      Fault::count("sum.arrive_threads", kReductionThreads, kReductionThreads - 32,
                                   kReductionThreads + 32));
    }
    return;
  }

  // Warp 0: the block's sum, from its first eight lanes.
  constexpr uint32_t kPartialsMask = (1u << kReductionWarps) - 1;
  if (Fault::flag("sum.partial_reader", lane < kReductionWarps)) {
    sum = warp_sum(shared.partials[lane],
                   Fault::value("sum.partials_mask", kPartialsMask, 0xffffffffu),
                   Fault::count("sum.partials_width", kReductionWarps, kReductionWarps / 2,
                                kReductionWarps * 2));
  }

  // Lane 0: takes over the running total of the part before, publishes its own.
  if (Fault::flag("sum.publisher", lane == 0)) {
    if (Fault::flag("sum.has_predecessor", part > 0)) {
      while (!Fault::skip("sum.flag_wait") &&
             ptx::load_acquire_gpu(p.ready + part - 1) < Fault::count("sum.flag", 1u, 0u, 2u)) {
      }
      sum = p.running[part - 1] + sum;
    }
    p.running[part] = sum;
    if (!Fault::skip("sum.flag_release")) ptx::store_release_gpu(p.ready + part, 1);
  }
}

struct SumAndMax {
  uint32_t sum;  // modulo 2^32
  uint32_t max;
};

struct SumAndMaxParams {
  const uint32_t* x;  // [count]
  int count;
  SumAndMax* partials;  // [blocks]
  SumAndMax* result;    // [1]
  uint32_t* ticket;     // [1], zero at launch and again at the end
};

struct SumAndMaxShared {
  SumAndMax block;
  uint32_t is_last;
};

// Lane 0 gets the sum and the maximum over the lanes [0, width).
__device__ __forceinline__ SumAndMax warp_sum_and_max(SumAndMax value, uint32_t mask, int width) {
  for (int offset = width / 2; offset > 0; offset /= 2) {
    const uint32_t other_max = __shfl_down_sync(mask, value.max, offset, width);
    value.sum += __shfl_down_sync(mask, value.sum, offset, width);
    value.max = max(value.max, other_max);
  }
  return value;
}

template <class Fault = emulator::NoFault>
__global__ void __launch_bounds__(kReductionThreads) sum_and_max(const SumAndMaxParams p) {
  SumAndMaxShared& shared = *reinterpret_cast<SumAndMaxShared*>(ptx::dynamic_shared_memory());
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int blocks = static_cast<int>(gridDim.x);

  if (Fault::flag("max.initialiser", threadIdx.x == 0)) shared.block = {0, 0};
  if (!Fault::skip("max.initialised")) __syncthreads();

  // Every thread: its elements, the warp's result to lane 0, the warps' results by atomics in
  // shared memory.
  SumAndMax own{0, 0};
  for (int i = static_cast<int>(blockIdx.x * kReductionThreads + threadIdx.x);
       i < Fault::count("max.elements", p.count, p.count - 1, p.count + 1);
       i += blocks * kReductionThreads) {
    own.sum += p.x[i];
    own.max = max(own.max, p.x[i]);
  }
  own = warp_sum_and_max(own, Fault::value("max.warp_mask", 0xffffffffu, 0xffffu),
                         Fault::count("max.warp_width", 32, 16, 64));
  if (Fault::flag("max.warp_writer", lane == 0)) {
    atomicAdd(&shared.block.sum, own.sum);
    atomicMax(&shared.block.max, own.max);
  }
  if (!Fault::skip("max.block_done")) __syncthreads();

  // Thread 0: leaves the block's result and draws a ticket. The first fence releases the result
  // with the ticket, the second acquires the results of all blocks whose tickets came before.
  if (Fault::flag("max.publisher", threadIdx.x == 0)) {
    p.partials[blockIdx.x] = shared.block;
    if (!Fault::skip("max.release_fence")) __threadfence();
    const uint32_t ticket = atomicAdd(p.ticket, 1u);
    if (!Fault::skip("max.acquire_fence")) __threadfence();
    shared.is_last =
        ticket == Fault::count("max.last_ticket", blocks - 1u, blocks - 2u, blocks + 0u);
  }
  if (!Fault::skip("max.ticket_drawn")) __syncthreads();

  // The last block's first warp: the result, and the ticket back to zero for the next launch.
  if (Fault::flag("max.finisher", shared.is_last != 0 && warp == 0)) {
    SumAndMax all{0, 0};
    for (int i = lane; i < Fault::count("max.partials", blocks, blocks - 1, blocks + 1); i += 32) {
      all.sum += p.partials[i].sum;
      all.max = max(all.max, p.partials[i].max);
    }
    all = warp_sum_and_max(all, Fault::value("max.finish_mask", 0xffffffffu, 0xffffu),
                           Fault::count("max.finish_width", 32, 16, 64));
    if (Fault::flag("max.result_writer", lane == 0)) {
      *p.result = all;
      // Atomic: no fence comes between the other blocks' draws and this.
      if (!Fault::skip("max.ticket_reset")) atomicExch(p.ticket, 0u);
    }
  }
}

}  // namespace specimens
