// Conformance cases of sm_90's functions except for TMA and wgmma.
#pragma once

#include "emulator/conformance/cases_sm80.h"
#include "ptx/mbarrier.h"
#include "ptx/sync.h"
#include "ptx/thread.h"

namespace conformance {

// ---- mma.h: stmatrix ----------------------------------------------------------------------------

// rows [32]: the row that each lane addresses, no two the same.
__global__ void store_rows(const uint32_t* in, const uint32_t* rows, unsigned char* out) {
  unsigned char* const shared = ptx::dynamic_shared_memory();
  for (uint32_t i = threadIdx.x; i < kRows * kRowBytes; i += 32) shared[i] = 0;
  __syncthreads();
  uint32_t r[4];
  for (int i = 0; i < 4; ++i) r[i] = in[i * 32 + threadIdx.x];
  ptx::stmatrix_x4(ptx::shared_address(shared) + kRowBytes * rows[threadIdx.x], r);
  __syncthreads();
  for (uint32_t i = threadIdx.x; i < kRows * kRowBytes; i += 32) out[i] = shared[i];
}

inline void case_stmatrix(Recorder& recorder) {
  Random random = recorder.begin("stmatrix_x4", {"stmatrix_x4"});
  auto in = recorder.input("in", random.integers<uint32_t>(32 * 4), {4, 32});
  std::vector<uint32_t> order(kRows);
  for (uint32_t i = 0; i < kRows; ++i) {
    order[i] = i;
    std::swap(order[i], order[random.below(i + 1)]);
  }
  order.resize(32);
  auto rows = recorder.input("rows", order);
  DeviceArray<uint8_t> out(kRows * kRowBytes);
  launch({1, 32, kRows * kRowBytes}, store_rows, in.data(), rows.data(), out.data());
  recorder.output("out", out);
}

// ---- thread.h -----------------------------------------------------------------------------------

// For each warp: whether exactly one lane is elected, and the same one twice.
__global__ void elect_lanes(uint32_t* out) {
  const bool elected = ptx::elect_sync(), again = ptx::elect_sync();
  const uint32_t lanes = __ballot_sync(0xffffffffu, elected);
  const uint32_t lanes_again = __ballot_sync(0xffffffffu, again);
  out[2 * threadIdx.x] = lanes != 0 && (lanes & (lanes - 1)) == 0;
  out[2 * threadIdx.x + 1] = lanes == lanes_again;
}

inline void case_elect(Recorder& recorder) {
  (void)recorder.begin("elect", {"elect_sync"});
  DeviceArray<uint32_t> out(std::vector<uint32_t>(2 * 64, 7));
  launch({1, 64}, elect_lanes, out.data());
  recorder.output("out", out, {64, 2});
}

// ---- clusters -----------------------------------------------------------------------------------

__device__ __forceinline__ void synchronize_cluster() {
  ptx::cluster_arrive();
  ptx::cluster_wait();
}

// One thread initialises the object and publishes it.
__device__ __forceinline__ void init_mbarrier(uint32_t bar, uint32_t count) {
  if (threadIdx.x != 0) return;
  ptx::mbarrier_init(bar, count);
  ptx::fence_mbarrier_init();
}

constexpr uint32_t kClusterBlocks = 4;

// Each block reads what its right neighbour wrote before the cluster's barrier.
__global__ void exchange_in_cluster(const uint32_t* in, uint32_t* identity, uint32_t* written,
                                    uint32_t* read) {
  const uint32_t thread = threadIdx.x, place = blockIdx.x * blockDim.x + thread;
  const uint32_t rank = ptx::cluster_rank(), peer = (rank + 1) % kClusterBlocks;
  if (thread == 0) {
    identity[2 * blockIdx.x] = rank;
    const uint32_t address = ptx::shared_address(ptx::dynamic_shared_memory());
    identity[2 * blockIdx.x + 1] =
        ptx::map_shared(address + 20, peer) - ptx::map_shared(address, peer);
  }
  written[place] = in[place] + 1;
  synchronize_cluster();
  read[place] = written[(blockIdx.x - rank + peer) * blockDim.x + thread];
}

inline void case_cluster(Recorder& recorder) {
  Random random =
      recorder.begin("cluster", {"cluster_rank", "map_shared", "cluster_arrive", "cluster_wait"});
  constexpr uint32_t kBlocks = 8, kThreads = 64;
  auto in = recorder.input("in", random.integers<uint32_t>(kBlocks * kThreads));
  DeviceArray<uint32_t> identity(2 * kBlocks), written(kBlocks * kThreads),
      read(kBlocks * kThreads);
  launch({kBlocks, kThreads, 64, kClusterBlocks}, exchange_in_cluster, in.data(), identity.data(),
         written.data(), read.data());
  recorder.output("identity", identity, {kBlocks, 2});
  recorder.output("read", read);
}

// ---- mbarrier.h ---------------------------------------------------------------------------------

// Two phases of 64 arrivals. seen: what try_wait returns for parity 1 and 0, before the first phase
// has completed and after the second.
__global__ void wait_for_phases(const uint32_t* in, uint32_t* out, uint32_t* seen) {
  unsigned char* const shared = ptx::dynamic_shared_memory();
  auto* const values = reinterpret_cast<uint32_t*>(shared + 64);
  const uint32_t bar = ptx::shared_address(shared), thread = threadIdx.x;
  const auto look = [&](uint32_t at) {
    __syncthreads();
    if (thread == 0) {
      seen[at] = ptx::mbarrier_try_wait(bar, 1);
      seen[at + 1] = ptx::mbarrier_try_wait(bar, 0);
    }
    __syncthreads();
  };
  if (thread == 0) ptx::mbarrier_init(bar, 64);
  look(0);
  for (uint32_t phase = 0; phase < 2; ++phase) {
    values[64 * phase + thread] = in[64 * phase + thread];
    ptx::mbarrier_arrive_expect_tx(bar, 0);
    ptx::mbarrier_wait(bar, phase);
    out[64 * phase + thread] = values[64 * phase + (thread ^ 33)];
  }
  look(2);
}

inline void case_mbarrier(Recorder& recorder) {
  Random random = recorder.begin("mbarrier", {"mbarrier_init", "mbarrier_arrive_expect_tx",
                                              "mbarrier_wait", "mbarrier_try_wait"});
  auto in = recorder.input("in", random.integers<uint32_t>(128));
  DeviceArray<uint32_t> out(128), seen(std::vector<uint32_t>(4, 7));
  launch({1, 64, 64 + 512}, wait_for_phases, in.data(), out.data(), seen.data());
  recorder.output("out", out);
  recorder.output("seen", seen);
}

// Every thread of the pair arrives, in each of two phases, at both blocks' objects, in the default
// form, which counts at either.
__global__ void arrive_remotely(uint32_t* seen) {
  unsigned char* const shared = ptx::dynamic_shared_memory();
  const uint32_t bar = ptx::shared_address(shared), thread = threadIdx.x;
  uint32_t* const mine = seen + 4 * (blockIdx.x * 32 + thread);
  init_mbarrier(bar, 64);
  ptx::cluster_arrive_relaxed();  // the fence has published the object
  ptx::cluster_wait();
  for (uint32_t phase = 0; phase < 2; ++phase) {
    mine[2 * phase] = ptx::mbarrier_try_wait(bar, phase & 1);  // this thread has not arrived yet
    for (uint32_t rank = 0; rank < 2; ++rank) ptx::mbarrier_arrive_remote(bar, rank);
    ptx::mbarrier_wait(bar, phase & 1);
    mine[2 * phase + 1] = ptx::mbarrier_try_wait(bar, phase & 1);
    synchronize_cluster();
  }
}

inline void case_mbarrier_remote(Recorder& recorder) {
  (void)recorder.begin("mbarrier_remote",
                       {"mbarrier_arrive_remote", "mbarrier_wait", "mbarrier_try_wait",
                        "fence_mbarrier_init", "cluster_arrive_relaxed"});
  DeviceArray<uint32_t> seen(std::vector<uint32_t>(4 * 64, 7));
  launch({2, 32, 64, 2}, arrive_remotely, seen.data());
  recorder.output("seen", seen);
}

// ---- thread.h, sync.h ---------------------------------------------------------------------------

// 168 registers per thread at launch; 40 for the first warpgroup leave 232 for the others.
__global__ void __launch_bounds__(384, 1) trade_registers(const uint32_t* in, uint32_t* out) {
  const uint32_t value = in[threadIdx.x];
  if (threadIdx.x < 128) {
    ptx::setmaxnreg_dec<40>();
    out[threadIdx.x] = value + 1;
  } else {
    ptx::setmaxnreg_inc<232>();
    out[threadIdx.x] = value * 3;
  }
}

inline void case_registers(Recorder& recorder) {
  Random random = recorder.begin("registers", {"setmaxnreg_dec", "setmaxnreg_inc"});
  auto in = recorder.input("in", random.integers<uint32_t>(384));
  DeviceArray<uint32_t> out(384);
  launch({1, 384}, trade_registers, in.data(), out.data());
  recorder.output("out", out);
}

__global__ void write_and_launch_dependents(const uint32_t* in, uint32_t* middle) {
  ptx::griddepcontrol_launch_dependents();
  const uint32_t place = blockIdx.x * blockDim.x + threadIdx.x;
  middle[place] = in[place] * 5;
}
__global__ void wait_and_read(const uint32_t* middle, uint32_t* out, uint32_t count) {
  const uint32_t place = blockIdx.x * blockDim.x + threadIdx.x;
  ptx::griddepcontrol_wait();
  out[place] = middle[count - 1 - place] + 1;
}

inline void case_grid_dependency(Recorder& recorder) {
  Random random = recorder.begin("grid_dependency",
                                 {"griddepcontrol_wait", "griddepcontrol_launch_dependents"});
  auto in = recorder.input("in", random.integers<uint32_t>(4 * 64));
  DeviceArray<uint32_t> middle(4 * 64), out(4 * 64);
  launch({4, 64}, write_and_launch_dependents, in.data(), middle.data());
  launch({4, 64, 0, 1, true}, wait_and_read, middle.data(), out.data(), 4u * 64u);
  recorder.output("out", out);
}

// Three grids launched with PDL, and an ordinary one. The third reads, past L1, what the first
// wrote, since the second has waited for the first. One block of the third waits for the second, so
// the fourth sees what the second wrote late.
__global__ void wait_and_launch_dependents(uint32_t* late) {
  ptx::griddepcontrol_wait();
  ptx::fence_acq_rel_gpu();
  ptx::griddepcontrol_launch_dependents();
  for (int i = 0; i < 200; ++i) __syncthreads();
  late[blockIdx.x * blockDim.x + threadIdx.x] = blockIdx.x * 7 + threadIdx.x;
}
__global__ void read_two_behind(const uint32_t* middle, uint32_t* out) {
  unsigned char* const shared = ptx::dynamic_shared_memory();
  const uint32_t place = blockIdx.x * blockDim.x + threadIdx.x;
  const uint32_t mine = ptx::shared_address(shared + threadIdx.x * 16);
  ptx::cp_async_16(mine, middle + place / 4 * 4, 16);
  ptx::cp_async_commit_group();
  ptx::cp_async_wait_group<0>();
  out[place] = reinterpret_cast<const uint32_t*>(shared + threadIdx.x * 16)[place % 4];
  if (blockIdx.x == 0) ptx::griddepcontrol_wait();
}
__global__ void read_all(const uint32_t* late, const uint32_t* out, uint32_t* sum) {
  const uint32_t place = blockIdx.x * blockDim.x + threadIdx.x;
  sum[place] = late[place] + out[place];
}

inline void case_grid_dependency_chain(Recorder& recorder) {
  Random random =
      recorder.begin("grid_dependency_chain",
                     {"griddepcontrol_wait", "griddepcontrol_launch_dependents", "cp_async_16"});
  auto in = recorder.input("in", random.integers<uint32_t>(4 * 64));
  DeviceArray<uint32_t> middle(4 * 64), late(4 * 64), out(4 * 64), sum(4 * 64);
  launch({4, 64}, write_and_launch_dependents, in.data(), middle.data());
  launch({4, 64, 0, 1, true}, wait_and_launch_dependents, late.data());
  launch({4, 64, 64 * 16, 1, true}, read_two_behind, middle.data(), out.data());
  launch({4, 64}, read_all, late.data(), out.data(), sum.data());
  recorder.output("out", out);
  recorder.output("sum", sum);
}

inline void record_sm90(Recorder& recorder) {
  case_stmatrix(recorder);
  case_elect(recorder);
  case_cluster(recorder);
  case_mbarrier(recorder);
  case_mbarrier_remote(recorder);
  case_registers(recorder);
  case_grid_dependency(recorder);
  case_grid_dependency_chain(recorder);
}

}  // namespace conformance
