// The job scheduler of lora_gemm_fused_shrink_sm90a: how clusters draw jobs from a counter
// (`ticket`), and how the jobs that compute T signal those that read it.
//
//   jobs      first    a pair of row blocks of T each, one for each block of the cluster
//             then     the tiles of Y
//
// A job of T waits for nothing, and a tile only for jobs with smaller numbers, which running
// clusters have drawn: so the grid ends even if only one cluster is resident.
#pragma once
#include "kernels/gemm/sm90a/pipeline.h"
#include "ptx/memory.h"
#include "ptx/sync.h"

namespace lora_ext::kernel {

// Parameters of T = scaling P A beside the product: A has the layout of Q, T is low_rank[0].t.
template <class T>
struct LoraFusedShrinkParams {
  T* t;      // [m, width]; columns past the rank become zero
  float* s;  // [m, rank]: P A in float; may be null
  int64_t t_pitch;
  int width;  // whole 16-byte chunks
  float scaling;

  // Counters, all zero at launch.
  uint32_t* ticket;  // [1], the number of the next job
  uint32_t* ready;   // [2 row pairs], per row block of T, consumers that have written their rows
  // Over all row blocks: T is complete at parts_of_t.
  uint32_t* written;  // [1]
};

// Two consumers write each row block.
constexpr uint32_t parts_of_t(uint32_t row_blocks) { return 2 * row_blocks; }

// Shared memory after the tile's: a ring of jobs that the scheduler has drawn ahead.
template <class Tile>
struct JobTile {
  static constexpr int kTickets = 2;
  static constexpr uint32_t kFull = Tile::kSharedBytes;  // mbarriers
  static constexpr uint32_t kEmpty = kFull + 8 * kTickets;
  static constexpr uint32_t kTicket = kEmpty + 8 * kTickets;
  static constexpr uint32_t kSharedBytes = kTicket + 4 * kTickets;
  static_assert(kSharedBytes <= 227 * 1024, "what sm_90 gives to a block");
};

template <class T, class Tile>
struct LoraGemmSm90aJobs {
  using Layout = JobTile<Tile>;
  using Block = LoraGemmSm90aBlock<T, Tile>;
  using Ring = StageRing<Layout::kTickets>;
  // Readers of a job number: in each block its producer and the warps of its consumers.
  static constexpr int kReaders = Tile::kClusterSize * (1 + Tile::kReaders);

  const Block& block;
  const LoraFusedShrinkParams<T>& in;

  __device__ __forceinline__ uint32_t full(int slot) const {
    return block.shared + Layout::kFull + 8 * static_cast<uint32_t>(slot);
  }
  __device__ __forceinline__ uint32_t empty(int slot) const {
    return block.shared + Layout::kEmpty + 8 * static_cast<uint32_t>(slot);
  }
  __device__ __forceinline__ uint32_t ticket(int slot) const {
    return block.shared + Layout::kTicket + 4 * static_cast<uint32_t>(slot);
  }

  const int jobs_for_t = block.row_pairs;

  __device__ __forceinline__ int count() const { return jobs_for_t + block.tiles; }
  __device__ __forceinline__ bool computes_t(int job) const { return job < jobs_for_t; }
  __device__ __forceinline__ int tile_of(int job) const { return job - jobs_for_t; }
  // First row of the block's half of a job of T.
  __device__ __forceinline__ int row_of(int job) const {
    return job * Tile::kPairM + static_cast<int>(block.rank) * Tile::kM;
  }

  // Called before the block's own set-up, whose fence and barrier publish this, too.
  __device__ __forceinline__ void set_up() const {
    if (threadIdx.x == 0) {
      for (int slot = 0; slot < Layout::kTickets; ++slot) {
        ptx::mbarrier_init(full(slot), 1u);
        ptx::mbarrier_init(empty(slot), kReaders);
      }
    }
  }

  // One thread of the cluster draws its jobs for both blocks; the last number is past all jobs.
  __device__ __forceinline__ void schedule() const {
    Ring ring;
    int job = 0;
    do {
      // Cluster scope, like the readers' arrivals: they have read the value that is overwritten.
      ptx::mbarrier_wait_cluster(empty(ring.slot), ring.parity ^ 1);
      job = static_cast<int>(ptx::atomic_add_relaxed_gpu(in.ticket, 1));
      for (uint32_t to = 0; to < Tile::kClusterSize; ++to) {
        ptx::store_shared_cluster<uint32_t>(ptx::map_shared(ticket(ring.slot), to),
                                            static_cast<uint32_t>(job));
        ptx::mbarrier_arrive_cluster(full(ring.slot), to);
      }
      ring.advance();
    } while (job < count());
  }

  // Returns the next job; `reader`: the thread, of those calling together, that signals.
  __device__ __forceinline__ int next(Ring& ring, bool reader) const {
    ptx::mbarrier_wait_cluster(full(ring.slot), ring.parity);
    const int job = static_cast<int>(ptx::load_shared_cluster<uint32_t>(ticket(ring.slot)));
    if (threadIdx.x >= Tile::kWarpgroup) __syncwarp();  // every lane has read it
    if (reader) ptx::mbarrier_arrive_cluster(empty(ring.slot), 0);
    ring.advance();
    return job;
  }

  // Signals that a consumer has written its rows of the block of T that begins at `row`; called by
  // one of its threads, after a barrier of all of them.
  __device__ __forceinline__ void publish(int row) const {
    ptx::atomic_add_release_gpu(in.ready + row / Tile::kM, 1);
    ptx::atomic_add_release_gpu(in.written, 1);
  }
  // Waits until all consumers have signalled. T was written by ordinary stores and is read by TMA.
  __device__ __forceinline__ void wait_until_ready(int row) const {
    const uint32_t* ready = in.ready + row / Tile::kM;
    while (ptx::load_acquire_gpu(ready) < Tile::kConsumers) {
    }
    ptx::fence_proxy_async_global();
  }
};

}  // namespace lora_ext::kernel
