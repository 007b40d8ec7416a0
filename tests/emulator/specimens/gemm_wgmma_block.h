// What every role of the clustered GEMM shares: where things are, the set-up of the barriers, the
// jobs, and the end.
#pragma once
#include "emulator/fault.h"
#include "emulator/specimens/gemm_wgmma_plan.h"
#include "ptx/barrier.h"
#include "ptx/fence.h"
#include "ptx/mbarrier.h"
#include "ptx/memory.h"
#include "ptx/thread.h"
#include "ptx/tma.h"

namespace specimens {

template <class Fault>
struct GemmWgmmaBlock {
  using Plan = SharedPlan;
  const GemmWgmmaMaps& maps;
  const GemmWgmmaParams& p;
  const Jobs jobs{p.m, p.n};
  const uint32_t shared = ptx::shared_address(ptx::dynamic_shared_memory());
  const uint32_t rank = ptx::cluster_rank();
  const int thread = threadIdx.x % kWarpgroup;
  const int warp = thread / 32, lane = thread % 32;
  const int consumer = static_cast<int>(threadIdx.x) / kWarpgroup - 1;
  const int k_steps = (p.k + kBlockK - 1) / kBlockK;

  __device__ __forceinline__ uint32_t full(int slot) const {
    return shared + Plan::kFull + 8 * slot;
  }
  __device__ __forceinline__ uint32_t empty(int slot) const {
    return shared + Plan::kEmpty + 8 * slot;
  }
  __device__ __forceinline__ uint32_t x_tile(int slot) const {
    return shared + Plan::kX + slot * Plan::kXBytes;
  }
  __device__ __forceinline__ uint32_t w_tile(int slot) const {
    return shared + Plan::kW + slot * Plan::kWBytes;
  }
  __device__ __forceinline__ uint32_t ticket_full(int slot) const {
    return shared + Plan::kTicketFull + 8 * slot;
  }
  __device__ __forceinline__ uint32_t ticket_empty(int slot) const {
    return shared + Plan::kTicketEmpty + 8 * slot;
  }

  __device__ __forceinline__ void set_up() const {
    constexpr int kWarps =
        kConsumers * 4;  // consumer warps of a block, each of which releases stages and tickets
    if (Fault::flag("setup.thread", threadIdx.x == 0)) {
      for (int slot = 0; slot < kStages; ++slot) {
        if (!Fault::skip("setup.init_full")) {
          ptx::mbarrier_init(full(slot), Fault::count("setup.full_count", 1, 0, 2));
        }
        if (!Fault::skip("setup.init_empty")) {
          // Both blocks' consumers read what this block multicasts.
          ptx::mbarrier_init(empty(slot),
                             Fault::count("setup.empty_count", kClusterSize * kWarps,
                                          kClusterSize * kWarps - 1, kClusterSize * kWarps + 1));
        }
      }
      for (int slot = 0; slot < kTickets; ++slot) {
        if (!Fault::skip("setup.init_ticket_full")) {
          ptx::mbarrier_init(ticket_full(slot), Fault::count("setup.ticket_full_count", 1, 0, 2));
        }
        if (!Fault::skip("setup.init_ticket_empty")) {
          // The readers: each block's producer and consumer warps.
          ptx::mbarrier_init(
              ticket_empty(slot),
              Fault::count("setup.ticket_empty_count", kClusterSize * (1 + kWarps),
                           kClusterSize * (1 + kWarps) - 1, kClusterSize * (1 + kWarps) + 1));
        }
      }
      if (!Fault::skip("setup.fence_init")) ptx::fence_mbarrier_init();
      ptx::prefetch_tensor_map(&maps.x);
      ptx::prefetch_tensor_map(&maps.w);
    }
    // Nobody may use a barrier of the peer's before the peer has initialised it.
    if (Fault::swap("setup.block_barrier_only")) {
      __syncthreads();
    } else {
      if (!Fault::skip("setup.cluster_arrive")) ptx::cluster_arrive();
      if (!Fault::skip("setup.cluster_wait")) ptx::cluster_wait();
    }
  }

  // The next job; `reader` is the one thread of those that call together which tells the scheduler.
  __device__ __forceinline__ int next_ticket(Ring<kTickets>& ring, bool reader) const {
    if (!Fault::skip("ticket.wait_full")) {
      ptx::mbarrier_wait_cluster(ticket_full(ring.slot),
                                 Fault::value("ticket.parity", ring.parity, ring.parity ^ 1));
    }
    const int ticket = static_cast<int>(
        ptx::load_shared_cluster<uint32_t>(shared + Plan::kTicket + 4 * ring.slot));
    if (Fault::flag("ticket.warp", consumer >= 0)) {
      if (!Fault::skip("ticket.syncwarp")) __syncwarp();  // every lane has read it
    }
    if (Fault::flag("ticket.reader", reader)) {
      if (!Fault::skip("ticket.arrive_empty"))
        ptx::mbarrier_arrive_cluster(ticket_empty(ring.slot), 0);
    }
    ring.advance();
    return ticket;
  }

  // max |S| over the cluster's consumer warps, through distributed shared memory.
  __device__ __forceinline__ float cluster_amax() const {
    float amax = 0.f;
    for (uint32_t block = 0;
         block < Fault::count("finish.blocks", kClusterSize + 0u, 1u, kClusterSize + 1u); ++block) {
      for (int i = 0;
           i < Fault::count("finish.warps", kConsumers * 4, kConsumers * 4 - 1, kConsumers * 4 + 1);
           ++i) {
        amax = fmaxf(amax, ptx::load_shared_cluster<float>(
                               ptx::map_shared(shared + Plan::kAmax + 4 * i, block)));
      }
    }
    return amax;
  }

  // The last cluster to come here combines what all have left, and cleans up for the next launch.
  __device__ __forceinline__ void finish_grid() const {
    const int cluster = static_cast<int>(blockIdx.x) / kClusterSize;
    const int clusters = static_cast<int>(gridDim.x) / kClusterSize;
    p.cluster_amax[cluster] = cluster_amax();
    if (!Fault::skip("finish.release_fence")) ptx::fence_acq_rel_gpu();
    const uint32_t before = ptx::atomic_add_relaxed_gpu(p.finished, 1);
    if (Fault::flag("finish.last_cluster", before == Fault::count("finish.clusters", clusters - 1u,
                                                                  clusters - 2u, clusters + 0u))) {
      if (!Fault::skip("finish.acquire_fence")) ptx::fence_acq_rel_gpu();
      float amax = 0.f;
      for (int i = 0; i < Fault::count("finish.amaxes", clusters, clusters - 1, clusters + 1);
           ++i) {
        amax = fmaxf(amax, p.cluster_amax[i]);
      }
      *p.amax = amax;
      for (int i = 0;
           i < Fault::count("finish.flags", jobs.row_pairs * kClusterSize,
                            jobs.row_pairs * kClusterSize - 1, jobs.row_pairs * kClusterSize + 1);
           ++i) {
        p.s_ready[i] = 0;
      }
      if (!Fault::skip("finish.reset_ticket")) *p.ticket = 0;
      // Atomic: no fence comes between the other clusters' counting and this.
      if (!Fault::skip("finish.reset_finished")) atomicExch(p.finished, 0u);
    }
  }

  // All threads of both blocks. The first cluster barrier makes the consumers' maxima visible and
  // says that no remote arrival or multicast is under way any more; the second keeps the peer's
  // shared memory alive until it has been read.
  __device__ __forceinline__ void finish() const {
    if (!Fault::skip("finish.cluster_fence")) ptx::fence_acq_rel_cluster();
    if (!Fault::skip("finish.arrive")) ptx::cluster_arrive_relaxed();
    if (!Fault::skip("finish.wait")) ptx::cluster_wait();
    if (Fault::flag("finish.thread", rank == 0 && threadIdx.x == 0)) finish_grid();
    if (!Fault::skip("finish.leave_arrive")) ptx::cluster_arrive();
    if (!Fault::skip("finish.leave_wait")) ptx::cluster_wait();
  }
};

}  // namespace specimens
