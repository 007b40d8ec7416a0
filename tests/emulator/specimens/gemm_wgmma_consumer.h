// A consumer warpgroup of the clustered GEMM: 64 rows of each job, from the stages through the
// tensor core to global memory.
#pragma once
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "emulator/specimens/gemm_wgmma_block.h"
#include "ptx/grid_dependency.h"
#include "ptx/matrix_move.h"

namespace specimens {

// Two elements in one register, the first in the low half.
template <class T>
__device__ __forceinline__ uint32_t pack(float low, float high) {
  if constexpr (std::is_same_v<T, __half>) {
    return __half_as_ushort(__float2half_rn(low)) |
           static_cast<uint32_t>(__half_as_ushort(__float2half_rn(high))) << 16;
  } else {
    return __bfloat16_as_ushort(__float2bfloat16_rn(low)) |
           static_cast<uint32_t>(__bfloat16_as_ushort(__float2bfloat16_rn(high))) << 16;
  }
}

template <class T, ptx::Major kMajorW, class Fault>
struct GemmWgmmaConsumer {
  using Plan = SharedPlan;
  const GemmWgmmaBlock<Fault>& block;
  const GemmWgmmaMaps& maps = block.maps;
  const GemmWgmmaParams& p = block.p;
  const Jobs& jobs = block.jobs;
  const int consumer = block.consumer, thread = block.thread, warp = block.warp, lane = block.lane;

  __device__ __forceinline__ void wait_stage(const Ring<kStages>& ring) const {
    if (!Fault::skip("consumer.wait_full")) {
      ptx::mbarrier_wait(block.full(ring.slot),
                         Fault::value("consumer.parity", ring.parity, ring.parity ^ 1));
    }
  }

  // This warp has left the stage: tells the producers of both blocks, since either has multicast
  // into it.
  __device__ __forceinline__ void release_stage(int slot) const {
    if (Fault::flag("consumer.releaser",
                    lane < Fault::count("consumer.release_blocks", kClusterSize, kClusterSize - 1,
                                        kClusterSize + 1))) {
      if (!Fault::skip("consumer.release")) ptx::mbarrier_arrive_cluster(block.empty(slot), lane);
    }
  }

  // The A fragment, 16 rows and 16 of k, from the swizzled X tile: chunk c of row r lies at
  // position c ^ (r % 8).
  __device__ __forceinline__ void load_fragment(uint32_t (&fragment)[4], uint32_t tile,
                                                int k16) const {
    const int row = consumer * 64 + warp * 16 + lane % 16;
    const int chunk = (k16 * 2 + lane / 16) ^ (row % 8);
    ptx::ldmatrix_x4(fragment, tile + row * Plan::kRowBytes + chunk * 16);
  }

  // S [64 rows, kRank] of this warpgroup = scale X Aᵀ, X from registers.
  __device__ __forceinline__ void compute_s(Ring<kStages>& ring, int row_block, float& amax) const {
    float acc[kRank / 2];
    for (int step = 0; step < Fault::count("consumer.s_steps", block.k_steps, block.k_steps - 1,
                                           block.k_steps + 1);
         ++step) {
      wait_stage(ring);
      uint32_t fragments[kBlockK / 16][4];
#pragma unroll
      for (int k16 = 0; k16 < kBlockK / 16; ++k16)
        load_fragment(fragments[k16], block.x_tile(ring.slot), k16);
      if (!Fault::skip("consumer.s_wgmma_fence")) ptx::wgmma_fence();
#pragma unroll
      for (int k16 = 0; k16 < kBlockK / 16; ++k16) {
        const uint64_t b = ptx::matrix_descriptor(block.w_tile(ring.slot) + k16 * 32, 16,
                                                  8 * Plan::kRowBytes, ptx::Swizzle::k128);
        ptx::wgmma_rs<T, kRank, ptx::Major::kK>(
            acc, fragments[k16], b, Fault::flag("consumer.s_accumulate", step + k16 > 0));
      }
      if (!Fault::skip("consumer.s_commit")) ptx::wgmma_commit_group();
      if (Fault::swap("consumer.s_wait_one_group_less")) {
        ptx::wgmma_wait_group<1>();
      } else if (!Fault::skip("consumer.s_wait")) {
        ptx::wgmma_wait_group<0>();
      }
      if (!Fault::skip("consumer.s_syncwarp")) __syncwarp();  // every lane has read its fragments
      release_stage(ring.slot);
      ring.advance();
    }
    publish_s(acc, row_block, amax);
  }

  // Writes S and counts this warpgroup's half as done.
  __device__ __forceinline__ void publish_s(const float (&acc)[kRank / 2], int row_block,
                                            float& amax) const {
    uint32_t* pairs = static_cast<uint32_t*>(p.s);  // [m, kRank / 2]
    const int first_row = row_block * kBlockM + consumer * 64 + warp * 16 + lane / 4;
#pragma unroll
    for (int i = 0; i < kRank / 2; i += 2) {
      const float low = acc[i] * p.scale, high = acc[i + 1] * p.scale;
      const int row = first_row + i / 2 % 2 * 8, column = i / 4 * 8 + lane % 4 * 2;
      if (Fault::flag("consumer.s_inside",
                      row < Fault::count("consumer.s_rows", p.m, p.m - 1, p.m + 1))) {
        pairs[(static_cast<size_t>(row) * kRank + column) / 2] = pack<T>(low, high);
      }
      amax = fmaxf(amax, fmaxf(fabsf(low), fabsf(high)));
    }
    if (!Fault::skip("consumer.s_barrier")) warpgroup_barrier();
    if (Fault::flag("consumer.s_publisher", thread == 0)) {
      if (!Fault::skip("consumer.s_publish")) ptx::atomic_add_release_gpu(p.s_ready + row_block, 1);
    }
  }

  // Of this consumer warpgroup alone.
  __device__ __forceinline__ void warpgroup_barrier() const {
    ptx::bar_sync(
        Fault::value("consumer.barrier_id", 1 + consumer, 1),
        Fault::count("consumer.barrier_threads", kWarpgroup, kWarpgroup - 32, kWarpgroup + 32));
  }

  // One k-step of a tile: kSteps wgmmas of 16 along k.
  template <int kSteps>
  __device__ __forceinline__ void multiply_stage(float (&acc)[kBlockN / 2], int slot,
                                                 bool accumulate) const {
    // K-major: rows of 128 bytes, 32 bytes further per k16, groups of 8 rows 1024 bytes apart.
    // MN-major: two boxes of 64 columns, 8192 bytes apart, with a row per k: 16 rows of 128 bytes
    // further per k16.
    constexpr bool kMN = kMajorW == ptx::Major::kMN;
    constexpr uint32_t kStep = kMN ? 16 * Plan::kRowBytes : 32,
                       kLeading = kMN ? Plan::kHalfBytes : 16;
    if (!Fault::skip("consumer.wgmma_fence")) ptx::wgmma_fence();
#pragma unroll
    for (int k16 = 0; k16 < kSteps; ++k16) {
      const uint32_t x = block.x_tile(slot) + consumer * 64 * Plan::kRowBytes + k16 * 32;
      ptx::wgmma_ss<T, kBlockN, ptx::Major::kK, kMajorW>(
          acc, ptx::matrix_descriptor(x, 16, 8 * Plan::kRowBytes, ptx::Swizzle::k128),
          ptx::matrix_descriptor(block.w_tile(slot) + k16 * kStep, kLeading, 8 * Plan::kRowBytes,
                                 ptx::Swizzle::k128),
          Fault::flag("consumer.accumulate", accumulate || k16 > 0));
    }
    if (!Fault::skip("consumer.commit")) ptx::wgmma_commit_group();
  }

  // Y [64 rows, 128 columns] of this warpgroup in registers. A stage is released one step late,
  // when the wgmmas that read it are known to be over while those of the next step run.
  __device__ __forceinline__ void compute_tile(Ring<kStages>& ring,
                                               float (&acc)[kBlockN / 2]) const {
    int previous = 0;
    for (int step = 0; step < Fault::count("consumer.tile_steps", block.k_steps, block.k_steps - 1,
                                           block.k_steps + 1);
         ++step) {
      wait_stage(ring);
      multiply_stage<kBlockK / 16>(acc, ring.slot, step > 0);
      if (Fault::swap("consumer.wait_one_group_less")) {
        ptx::wgmma_wait_group<2>();
      } else if (!Fault::skip("consumer.wait_previous")) {
        ptx::wgmma_wait_group<1>();
      }
      if (Fault::flag("consumer.has_previous", step > 0)) release_stage(previous);
      previous = ring.slot;
      ring.advance();
    }
    wait_stage(ring);
    multiply_stage<kRank / 16>(acc, ring.slot, true);
    if (Fault::swap("consumer.wait_last_one_less")) {
      ptx::wgmma_wait_group<1>();
    } else if (!Fault::skip("consumer.wait_last")) {
      ptx::wgmma_wait_group<0>();
    }
    release_stage(previous);
    release_stage(ring.slot);
    ring.advance();
  }

  // Adds the bias and stores through a staging slab of 64 x 64, while the slab before is still
  // being read.
  __device__ __forceinline__ void store_tile(const float (&acc)[kBlockN / 2], int row_block,
                                             int column_block, uint32_t& slab) const {
    if (!Fault::skip("epilogue.grid_wait"))
      ptx::griddepcontrol_wait();  // the bias is the grid before's
#pragma unroll
    for (int part = 0; part < kBlockN / 64; ++part) {
      const int column0 = column_block * kBlockN + part * 64;
      const uint32_t staging =
          block.shared + Plan::kStaging + (consumer * Plan::kSlabs + slab) * Plan::kSlabBytes;
      if (Fault::value("epilogue.waiter", thread == 0, false)) {
        // At most the store of the other slab may still read.
        if (Fault::swap("epilogue.wait_one_group_less")) {
          ptx::bulk_wait_group_read<Plan::kSlabs>();
        } else if (!Fault::skip("epilogue.wait_read")) {
          ptx::bulk_wait_group_read<Plan::kSlabs - 1>();
        }
      }
      if (!Fault::skip("epilogue.slab_free")) warpgroup_barrier();
#pragma unroll
      for (int j = 0; j < 4; ++j) {  // 16 columns: four 8 x 8 matrices of this warp's 16 rows
        uint32_t packed[4];
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const int column = column0 + j * 16 + i / 2 * 8 + lane % 4 * 2;
          const int element = part * 32 + j * 8 + i * 2;
          const int columns = Fault::count("epilogue.bias_columns", p.n, p.n - 1, p.n + 1);
          const float low =
              Fault::flag("epilogue.bias_low", column < columns) ? p.bias[column] : 0.f;
          const float high =
              Fault::flag("epilogue.bias_high", column + 1 < columns) ? p.bias[column + 1] : 0.f;
          packed[i] = pack<T>(acc[element] + low, acc[element + 1] + high);
        }
        const int row = warp * 16 + lane % 16;
        const int chunk = (j * 2 + lane / 16) ^ (row % 8);
        ptx::stmatrix_x4(staging + row * Plan::kRowBytes + chunk * 16, packed);
      }
      if (!Fault::skip("epilogue.proxy_fence")) ptx::fence_proxy_async_shared();
      if (!Fault::skip("epilogue.slab_full")) warpgroup_barrier();
      if (Fault::flag("epilogue.storer", thread == 0)) {
        ptx::tma_store_2d(&maps.y, staging, column0, row_block * kBlockM + consumer * 64);
        if (!Fault::skip("epilogue.commit")) ptx::bulk_commit_group();
      }
      slab ^= 1;
    }
  }

  __device__ __forceinline__ void consume() const {
    Ring<kStages> ring;
    Ring<kTickets> tickets;
    uint32_t slab = 0;
    float amax = 0.f;
    for (;;) {
      const int ticket = block.next_ticket(tickets, lane == 0);
      if (Fault::flag("consumer.done",
                      ticket >= Fault::count("consumer.jobs", jobs.total(), jobs.total() - 1,
                                             jobs.total() + 1))) {
        break;
      }
      const int row_block = ticket % jobs.row_pairs * kClusterSize + static_cast<int>(block.rank);
      if (Fault::flag("consumer.s_job", ticket < jobs.row_pairs)) {
        compute_s(ring, row_block, amax);
      } else {
        float acc[kBlockN / 2];
        compute_tile(ring, acc);
        store_tile(acc, row_block, ticket / jobs.row_pairs - 1, slab);
      }
    }
    if (Fault::value("consumer.drainer", thread == 0, false)) {
      // Not only read: the writes, too, belong to this grid.
      if (!Fault::skip("consumer.drain")) ptx::bulk_wait_group<0>();
    }
    for (int offset = Fault::value("consumer.amax_offset", 16, 8); offset > 0; offset /= 2) {
      amax = fmaxf(amax, __shfl_down_sync(Fault::value("consumer.amax_mask", 0xffffffffu, 0xffffu),
                                          amax, offset));
    }
    if (Fault::flag("consumer.amax_writer", lane == 0)) {
      ptx::store_shared_cluster<float>(block.shared + Plan::kAmax + 4 * (consumer * 4 + warp),
                                       amax);
    }
  }
};

}  // namespace specimens
