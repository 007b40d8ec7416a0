// lora_gemm on sm_90a that also computes its own T: one launch instead of lora_shrink, lora_reduce
// and lora_gemm.
//
//     T = scaling P A          forward S = X A^T, backward dS = dY B
//     Y = P Q + mask * (T U) + bias
//
// P passes through the ring twice; the first time, the first N columns of the right tiles hold A
// instead of Q. T is written to global memory, since wgrad reads it, too, and the producer of each
// tile waits for its row block of T before it loads it. Only for one term of rank 64 at most, and P
// without dropout: forward with dropout, and float32 adapters, take T from lora_reduce.
#pragma once
#include "kernels/gemm/sm90a/jobs.h"
#include "kernels/gemm/sm90a/kernel.h"

namespace lora_ext::kernel {

struct LoraFusedShrinkMaps {
  LoraGemmMaps gemm;
  CUtensorMap a;  // [rank, k] or [k, rank], boxes of kRightBoxRows of kShrinkColumns
};

// Columns of T that a job computes: those of the tail, since the rank is at most one step of T U.
template <int kTail>
constexpr int kShrinkColumns = 16 * kTail;

template <class T, class Tile, bool kMNMajor, bool kMasked, int kTail>
struct LoraFusedShrinkProducer {
  using Jobs = LoraGemmSm90aJobs<T, Tile>;
  using Producer = LoraGemmSm90aProducer<T, Tile, kMNMajor, kMasked>;

  const LoraFusedShrinkMaps& maps;
  const Jobs& jobs;
  const Producer producer{jobs.block};

  __device__ __forceinline__ void produce() const {
    // lora_wgrad may start on SMs that the last tiles leave idle; it waits for T itself.
    if (jobs.block.p.trigger_dependents) Producer::launch_dependents();
    typename Producer::Ring ring;
    typename Jobs::Ring tickets;
    for (;;) {
      const int job = jobs.next(tickets, true);
      if (job >= jobs.count()) return;
      if (jobs.computes_t(job)) {
        load_shrink(ring, jobs.row_of(job));
      } else {
        load_tile(ring, jobs.block.place_of(jobs.tile_of(job)));
      }
    }
  }

  __device__ __forceinline__ void load_shrink(typename Producer::Ring& ring, int row) const {
    const int steps = jobs.block.main_steps;
    for (int step = 0; step < steps; ++step) {
      producer.template load<kShrinkColumns<kTail>>(ring, &maps.gemm.p, &maps.a, step * Tile::kK,
                                                    {row, 0});
    }
  }

  __device__ __forceinline__ void load_tile(typename Producer::Ring& ring,
                                            const typename Producer::Place& at) const {
    if constexpr (!kMasked) producer.load_main_product(ring, at);
    jobs.wait_until_ready(at.row);
    producer.load_low_rank_product(ring, at);
    if constexpr (kMasked) producer.load_main_product(ring, at);
  }
};

template <class T, class Tile, bool kMNMajor, bool kMasked, int kTail>
struct LoraFusedShrinkConsumer {
  using Jobs = LoraGemmSm90aJobs<T, Tile>;
  using Consumer = LoraGemmSm90aConsumer<T, Tile, kMNMajor, kMasked, kTail>;
  static constexpr int kSums = kShrinkColumns<kTail> / 2;  // per thread
  using Sums = float[Tile::kRowBlocks][kSums];

  const Jobs& jobs;
  const int consumer_index;
  const Consumer consumer{jobs.block, consumer_index};

  __device__ __forceinline__ void consume() const {
    typename Consumer::Ring ring;
    typename Consumer::MaskAhead ahead = consumer.mask_ahead();
    typename Jobs::Ring tickets;
    const auto next_job = [&] { return jobs.next(tickets, consumer.lane == 0); };
    for (int job = next_job(), next = 0; job < jobs.count(); job = next) {
      if constexpr (kMasked) next = next_job();  // its mask is drawn beside this one
      if (jobs.computes_t(job)) {
        shrink(ring, jobs.row_of(job));
      } else {
        typename Consumer::Accumulators acc;
        const auto at = consumer.compute(acc, ring, jobs.tile_of(job), jobs.tile_of(next), ahead);
        consumer.epilogue.store(acc, at);
      }
      if constexpr (!kMasked) next = next_job();
    }
    consumer.epilogue.drain();
  }

  // Computes the block's rows of T from `row` on, 64 per consumer.
  __device__ __forceinline__ void shrink(typename Consumer::Ring& ring, int row) const {
    Sums sums;
    typename Consumer::Progress now{ring};
    consumer.multiply_main(sums, now);
    consumer.finish(sums, ring, now);
    store(sums, row);
    consumer.epilogue.warpgroup_barrier();
    if (consumer.epilogue.thread == 0) jobs.publish(row);
  }

  __device__ __forceinline__ void store(const Sums& sums, int row) const {
    const auto& p = jobs.block.p;
    const auto& epilogue = consumer.epilogue;
    const int first_row = epilogue.first_row({row, 0}, 0) + epilogue.lane / 4;
#pragma unroll
    for (int i = 0; i < kSums; ++i) {
      const int to_row = first_row + i / 2 % 2 * 8;
      const int column = i / 4 * 8 + epilogue.lane % 4 * 2 + i % 2;
      if (to_row < p.m) {
        if (column < jobs.in.width) {
          jobs.in.t[to_row * jobs.in.t_pitch + column] = high_half<T>(jobs.in.scaling * sums[0][i]);
        }
        if (jobs.in.s != nullptr && column < p.rank)
          jobs.in.s[static_cast<int64_t>(to_row) * p.rank + column] = sums[0][i];
      }
    }
  }
};

// As lora_gemm_sm90a, but never launched with PDL: it draws job numbers at once, before it could
// wait for the kernel that sets the counters to zero.
template <class T, class Tile, bool kMNMajor, bool kMasked, int kTail>
__global__ void __launch_bounds__(Tile::kThreads, 1)
    lora_gemm_fused_shrink_sm90a(const __grid_constant__ LoraFusedShrinkMaps maps,
                                 const __grid_constant__ LoraGemmParams<T> p,
                                 const __grid_constant__ LoraFusedShrinkParams<T> in) {
  static_assert(kMNMajor || !kMasked, "only dX is masked");
  static_assert(!Tile::kPingpong, "a job for T is for both consumers");
  if constexpr (ptx::kHasSm90a) {
    const LoraGemmSm90aBlock<T, Tile> block{maps.gemm, p};
    const LoraGemmSm90aJobs<T, Tile> jobs{block, in};
    jobs.set_up();
    block.set_up();
    dispatch_role<Tile>(
        [&](int warp) {
          if (warp == 0 && ptx::elect_sync())
            LoraFusedShrinkProducer<T, Tile, kMNMajor, kMasked, kTail>{maps, jobs}.produce();
          if (warp == 1 && block.rank == 0 && ptx::elect_sync()) jobs.schedule();
        },
        [&](int consumer) {
          LoraFusedShrinkConsumer<T, Tile, kMNMajor, kMasked, kTail>{jobs, consumer}.consume();
        });
    block.sync_before_exit();
  }
}

}  // namespace lora_ext::kernel
