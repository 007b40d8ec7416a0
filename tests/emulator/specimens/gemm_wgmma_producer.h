// The producer warpgroup of the clustered GEMM: one thread that loads, and one thread of the
// cluster that hands out jobs.
#pragma once
#include "emulator/specimens/gemm_wgmma_block.h"

namespace specimens {

template <ptx::Major kMajorW, class Fault>
struct GemmWgmmaProducer {
  using Plan = SharedPlan;
  const GemmWgmmaBlock<Fault>& block;
  const GemmWgmmaMaps& maps = block.maps;
  const GemmWgmmaParams& p = block.p;
  const Jobs& jobs = block.jobs;

  __device__ __forceinline__ void schedule() const {
    Ring<kTickets> ring;
    int ticket = 0;
    do {
      if (!Fault::skip("scheduler.wait_empty")) {
        ptx::mbarrier_wait(block.ticket_empty(ring.slot),
                           Fault::value("scheduler.parity", ring.parity ^ 1, ring.parity));
      }
      ticket = static_cast<int>(ptx::atomic_add_relaxed_gpu(p.ticket, 1));
      for (uint32_t to = 0;
           to < Fault::count("scheduler.blocks", ptx::cluster_size(), 1, kClusterSize + 1); ++to) {
        const uint32_t target = ptx::map_shared(block.shared + Plan::kTicket + 4 * ring.slot, to);
        ptx::store_shared_cluster<uint32_t>(target, ticket);
        if (!Fault::skip("scheduler.arrive_full")) {
          ptx::mbarrier_arrive_cluster(block.ticket_full(ring.slot), to);
        }
      }
      ring.advance();
    } while (ticket < Fault::value("scheduler.jobs", jobs.total(), jobs.total() - 1));
  }

  // Waits until every consumer of the cluster has left the stage, then announces what will arrive
  // in it.
  __device__ __forceinline__ void acquire_stage(const Ring<kStages>& ring, uint32_t bytes) const {
    if (!Fault::skip("producer.wait_empty")) {
      ptx::mbarrier_wait(block.empty(ring.slot),
                         Fault::value("producer.parity", ring.parity ^ 1, ring.parity));
    }
    if (!Fault::skip("producer.expect")) {
      ptx::mbarrier_arrive_expect_tx(
          block.full(ring.slot), Fault::count("producer.bytes", bytes, bytes - 128, bytes + 128));
    }
  }

  // Loads for S: X [128 rows, 64 columns of k] and A [kRank rows, the same columns].
  __device__ __forceinline__ void load_s_job(Ring<kStages>& ring, int row_block) const {
    for (int step = 0; step < Fault::count("producer.s_steps", block.k_steps, block.k_steps - 1,
                                           block.k_steps + 1);
         ++step) {
      acquire_stage(ring, Plan::kXBytes + Plan::kABytes);
      ptx::tma_load_2d(block.x_tile(ring.slot), &maps.x, block.full(ring.slot), step * kBlockK,
                       row_block * kBlockM);
      ptx::tma_load_2d(block.w_tile(ring.slot), &maps.a, block.full(ring.slot), step * kBlockK, 0);
      ring.advance();
    }
  }

  // Waits until both consumer warpgroups of whichever block computed this S block have published
  // their halves.
  __device__ __forceinline__ void acquire_s(int row_block) const {
    while (!Fault::skip("producer.s_wait") && ptx::load_acquire_gpu(p.s_ready + row_block) <
                                                  Fault::count("producer.s_parts", kConsumers + 0u,
                                                               kConsumers - 1u, kConsumers + 1u)) {
    }
    // S was written by ordinary stores and is read by TMA: the asynchronous proxy has to see what
    // was acquired.
    if (!Fault::skip("producer.s_proxy_fence")) ptx::fence_proxy_async_global();
  }

  // Loads for a tile of Y: X and W along k, then S and B. Of W and B each block loads the half of
  // its rank, for both blocks.
  __device__ __forceinline__ void load_tile(Ring<kStages>& ring, int row_block,
                                            int column_block) const {
    const int half_column =
        column_block * kBlockN + static_cast<int>(block.rank) * (kBlockN / kClusterSize);
    for (int step = 0; step < Fault::count("producer.tile_steps", block.k_steps + 1, block.k_steps,
                                           block.k_steps + 2);
         ++step) {
      const bool low_rank = Fault::flag("producer.low_rank", step == block.k_steps);
      if (low_rank) acquire_s(row_block);
      acquire_stage(ring, Plan::kXBytes + Plan::kWBytes);
      const int k0 = low_rank ? 0 : step * kBlockK;
      ptx::tma_load_2d(block.x_tile(ring.slot), low_rank ? &maps.s : &maps.x, block.full(ring.slot),
                       k0, row_block * kBlockM);
      const CUtensorMap* w = low_rank ? &maps.b : &maps.w;
      const uint32_t half = block.w_tile(ring.slot) + block.rank * Plan::kHalfBytes;
      const uint16_t both = Fault::count("producer.multicast", 0b11, 0b01, 0b111);
      if constexpr (kMajorW == ptx::Major::kK) {
        ptx::tma_load_2d_multicast(half, w, block.full(ring.slot), k0, half_column, both);
      } else {
        ptx::tma_load_2d_multicast(half, w, block.full(ring.slot), half_column, k0, both);
      }
      ring.advance();
    }
  }

  __device__ __forceinline__ void produce() const {
    Ring<kStages> ring;
    Ring<kTickets> tickets;
    for (;;) {
      const int ticket = block.next_ticket(tickets, true);
      if (Fault::flag("producer.done",
                      ticket >= Fault::count("producer.jobs", jobs.total(), jobs.total() - 1,
                                             jobs.total() + 1))) {
        return;
      }
      const int row_block = ticket % jobs.row_pairs * kClusterSize + static_cast<int>(block.rank);
      if (Fault::flag("producer.s_job", ticket < jobs.row_pairs)) {
        load_s_job(ring, row_block);
      } else {
        load_tile(ring, row_block, ticket / jobs.row_pairs - 1);
      }
    }
  }
};

}  // namespace specimens
