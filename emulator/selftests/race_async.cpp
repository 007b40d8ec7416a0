// The race checker and asynchronous operations: cp.async, mbarriers, TMA, wgmma, and the two
// proxies.
#include "emulator/selftests/race_kernels.h"

namespace emulator::selftest {
namespace {

constexpr uint32_t kTileRows = 16, kTileColumns = 32;  // of float: rows of 128 bytes
constexpr uint32_t kTileElements = kTileRows * kTileColumns, kTileBytes = kTileElements * 4;
constexpr uint32_t kBar = 8192;  // shared address of the mbarriers

CUtensorMap tile_map(GlobalBuffer<float>& buffer, uint32_t rows = kTileRows) {
  return tensor_map(buffer.data(), CU_TENSOR_MAP_DATA_TYPE_FLOAT32, Swizzle::kNone, kTileColumns,
                    rows, kTileColumns * 4, kTileColumns, kTileRows);
}

void load_tile(const CUtensorMap& map) {
  mbarrier_arrive_expect_tx(kBar, kTileBytes);
  tma_load_2d(0, &map, kBar, 0, 0);
}

TEST(cp_async_needs_its_wait_and_a_barrier) {
  const auto run = [] {
    GlobalBuffer<float> source(128, "source"), result(128, "result");
    source.fill(1);
    launch(race_launch(1, 32), [&] {
      cp_async_16(threadIdx.x * 16, source.data() + threadIdx.x * 4, 16);
      cp_async_commit_group();
      if (missing("wait before source is overwritten")) source[threadIdx.x * 4] = 2;
      if (!missing("wait")) cp_async_wait_group(0);
      if (!missing("barrier")) __syncthreads();
      const uint32_t other = (threadIdx.x + 1) % 32;
      result[threadIdx.x] = shared_array<float>()[other * 4];
      cp_async_wait_group(0);
    });
  };
  expect_clean(run);
  expect_diagnosis("wait", run);
  expect_diagnosis("barrier", run);
  expect_race("wait before source is overwritten", "global buffer 'source'", run);
}

// Two stages, one producer warp, one consumer warp, full and empty mbarriers, plain stores as the
// payload.
TEST(mbarriers_order_a_ring) {
  const auto run = [] {
    launch(race_launch(1, 64, 16384), [] {
      constexpr int kStages = 2, kSteps = 6;
      init_mbarriers(kBar, {32, 32, 32, 32});
      float* values = shared_array<float>();
      for (int step = 0; step < kSteps; ++step) {
        const uint32_t stage = static_cast<uint32_t>(step % kStages);
        const auto phase = static_cast<uint32_t>(step / kStages & 1);
        const uint32_t full = kBar + 8 * stage, empty = kBar + 16 + 8 * stage;
        const uint32_t lane = threadIdx.x % 32;
        if (threadIdx.x < 32) {
          if (!missing("empty")) mbarrier_wait(empty, phase ^ 1);
          values[stage * 32 + lane] = static_cast<float>(step);
          mbarrier_arrive(full);
        } else {
          mbarrier_wait(full, phase);
          if (missing("read before release")) mbarrier_arrive(empty);
          const float value = values[stage * 32 + 31 - lane];
          if (!missing("read before release")) mbarrier_arrive(empty);
          CHECK(value == static_cast<float>(step) || missing_edge != "");
        }
      }
    });
  };
  expect_clean(run);
  expect_diagnosis("empty", run);
  expect_diagnosis("read before release", run);
}

// TMA load, in-place update by all threads, TMA store.
TEST(tma_round_trip_needs_both_proxy_edges) {
  const auto run = [] {
    GlobalBuffer<float> in(kTileElements, "in"), out(kTileElements, "out");
    in.fill(1);
    const CUtensorMap in_map = tile_map(in), out_map = tile_map(out);
    launch(race_launch(1, 128, 16384), [&] {
      init_mbarriers(kBar, {1});
      if (threadIdx.x == 0) load_tile(in_map);
      if (!missing("wait")) mbarrier_wait(kBar, 0);
      float* tile = shared_array<float>();
      for (uint32_t i = threadIdx.x; i < kTileElements; i += 128) tile[i] += 1;
      const bool in_one_warp = missing("proxy fence in one warp") && threadIdx.x / 32 == 2;
      if (!missing("proxy fence") && !in_one_warp) fence_proxy_async_shared();
      if (!missing("barrier")) __syncthreads();
      if (threadIdx.x == 0) {
        tma_store_2d(&out_map, 0, 0, 0);
        bulk_commit_group();
        if (!missing("wait for reads")) bulk_wait_group_read(0);
        tile[0] = 5;
        bulk_wait_group(0);
      }
      mbarrier_wait(kBar, 0);
    });
    if (missing_edge.empty()) CHECK(out[7] == 2);
  };
  expect_clean(run);
  expect_diagnosis("wait", run);
  expect_race("proxy fence", "no fence.proxy.async", run);
  expect_race("proxy fence in one warp", "no fence.proxy.async", run);
  expect_race("barrier", "unordered", run);
  expect_diagnosis("wait for reads", run);
}

// A fence anywhere on the path between the write and the operation is enough.
TEST(the_issuer_may_fence_for_all) {
  expect_clean([] {
    GlobalBuffer<float> out(kTileElements, "out");
    const CUtensorMap map = tile_map(out);
    launch(race_launch(1, 128, 16384), [&] {
      for (uint32_t i = threadIdx.x; i < kTileElements; i += 128) shared_array<float>()[i] = 1;
      __syncthreads();
      if (threadIdx.x == 0) {
        fence_proxy_async_shared();
        tma_store_2d(&map, 0, 0, 0);
        bulk_commit_group();
        bulk_wait_group(0);
      }
    });
  });
}

// What a TMA store wrote may be read after the full wait, not after the wait for its reads.
TEST(a_bulk_store_is_visible_after_the_full_wait) {
  const auto run = [] {
    GlobalBuffer<float> out(kTileElements, "out"), copy(32, "copy");
    out.fill(0);
    const CUtensorMap map = tile_map(out);
    launch(race_launch(1, 32, 16384), [&] {
      for (uint32_t i = threadIdx.x; i < kTileElements; i += 32) shared_array<float>()[i] = 1;
      fence_proxy_async_shared();
      __syncthreads();
      if (threadIdx.x == 0) {
        tma_store_2d(&map, 0, 0, 0);
        bulk_commit_group();
        missing("full wait") ? bulk_wait_group_read(0) : bulk_wait_group(0);
      }
      __syncthreads();
      copy[threadIdx.x] = out[threadIdx.x];
      if (threadIdx.x == 0) bulk_wait_group(0);
    });
  };
  expect_clean(run);
  expect_race("full wait", "global buffer 'out'", run);
}

// One block writes global memory, publishes a flag, another loads it by TMA: the generic writes
// must pass to the async proxy.
TEST(global_memory_needs_a_proxy_fence_before_tma) {
  const auto run = [] {
    GlobalBuffer<float> s(kTileElements, "s");
    GlobalBuffer<uint32_t> flag(1, "flag");
    flag.fill(0);
    const CUtensorMap map = tile_map(s);
    launch(race_launch(2, 128, 16384), [&] {
      init_mbarriers(kBar, {1});
      if (blockIdx.x == 0) {
        for (uint32_t i = threadIdx.x; i < kTileElements; i += 128) s[i] = 1;
        if (missing("global, not shared"))
          fence_proxy_async_shared();
        else if (!missing("proxy fence"))
          fence_proxy_async_global();
        __syncthreads();
        if (threadIdx.x == 0) store_release_gpu(flag.data(), 1);
      } else {
        if (threadIdx.x == 0) {
          poll(flag.data());
          load_tile(map);
        }
        mbarrier_wait(kBar, 0);
        CHECK(shared_array<float>()[threadIdx.x] == 1 || missing_edge != "");
      }
    });
  };
  expect_clean(run);
  expect_race("proxy fence", "no fence.proxy.async", run);
  expect_race("global, not shared", "no fence.proxy.async", run);
}

// The start of a grid orders what the grids before it wrote across proxies, for itself and for a
// dependent that starts beside it; griddepcontrol.wait does not.
TEST(the_start_of_a_grid_passes_global_memory_to_tma) {
  const auto run = [] {
    GlobalBuffer<float> s(kTileElements, "s");
    const CUtensorMap map = tile_map(s);
    LaunchConfig write = race_launch(2, 128), load = race_launch(1, 128, 16384);
    write.programmatic_dependent = load.programmatic_dependent = true;
    const bool beside = missing("grid between") || missing("proxy fence");
    Stream stream;
    stream.launch(write, [&] {
      if (beside) griddepcontrol_launch_dependents();
      for (uint32_t i = blockIdx.x * 128 + threadIdx.x; i < kTileElements; i += 256) s[i] = 1;
    });
    if (!beside)
      stream.launch(race_launch(1, 32), [] {
        if (!missing("fence")) fence_acq_rel_gpu();
        griddepcontrol_launch_dependents();
      });
    stream.launch(load, [&] {
      init_mbarriers(kBar, {1});
      if (threadIdx.x == 0) {
        if (missing("proxy fence")) griddepcontrol_wait();
        load_tile(map);
      }
      mbarrier_wait(kBar, 0);
      CHECK(shared_array<float>()[threadIdx.x] == 1 || missing_edge != "");
    });
    stream.synchronize();
  };
  expect_clean(run);
  expect_diagnosis("grid between", run);
  expect_diagnosis("fence", run);
  expect_race("proxy fence", "no fence.proxy.async", run);
}

// Also what a thread wrote before a load overwrites it must have passed to the async proxy.
TEST(a_load_over_a_generic_write_needs_a_proxy_fence) {
  const auto run = [] {
    GlobalBuffer<float> in(kTileElements, "in");
    in.fill(1);
    const CUtensorMap map = tile_map(in);
    launch(race_launch(1, 64, 16384), [&] {
      init_mbarriers(kBar, {1});
      shared_array<float>()[threadIdx.x] = 0;
      if (!missing("proxy fence")) fence_proxy_async_shared();
      if (!missing("barrier")) __syncthreads();
      if (threadIdx.x == 0) load_tile(map);
      mbarrier_wait(kBar, 0);
    });
  };
  expect_clean(run);
  expect_race("proxy fence", "no fence.proxy.async", run);
  expect_race("barrier", "", run);
}

// A ring of one stage filled by TMA and read by threads: no proxy fence is needed before a load
// overwrites what was only read.
TEST(tma_ring_orders_reads_before_the_next_load) {
  const auto run = [] {
    GlobalBuffer<float> in(kTileElements, "in");
    in.fill(1);
    const CUtensorMap map = tile_map(in);
    launch(race_launch(1, 64, 16384), [&] {
      init_mbarriers(kBar, {1, 32});
      const uint32_t full = kBar, empty = kBar + 8;
      for (uint32_t step = 0; step < 4; ++step) {
        if (threadIdx.x == 0) {
          if (!missing("empty")) mbarrier_wait(empty, (step & 1) ^ 1);
          mbarrier_arrive_expect_tx(full, kTileBytes);
          tma_load_2d(0, &map, full, 0, 0);
        }
        if (threadIdx.x >= 32) {
          mbarrier_wait(full, step & 1);
          if (missing("read before release")) mbarrier_arrive(empty);
          const float value = shared_array<float>()[threadIdx.x];
          if (!missing("read before release")) mbarrier_arrive(empty);
          CHECK(value == 1 || missing_edge != "");
        }
      }
    });
  };
  expect_clean(run);
  expect_diagnosis("read before release", run);
}

// A multicast from either block of a cluster into both, with empty barriers that count the
// consumers of both.
TEST(multicast_ring) {
  const auto run = [] {
    GlobalBuffer<float> in(2 * kTileElements, "in");
    in.fill(1);
    const CUtensorMap map = tile_map(in, 2 * kTileRows);
    launch(race_launch(2, 64, 16384, 2), [&] {
      const uint32_t full = kBar, empty = kBar + 8, rank = cluster_rank();
      init_mbarriers(kBar, {1, 2});
      sync_cluster();
      for (uint32_t step = 0; step < 3; ++step) {
        if (threadIdx.x == 0) {
          mbarrier_wait(empty, (step & 1) ^ 1);
          mbarrier_arrive_expect_tx(full, 2 * kTileBytes);
          tma_load_2d_multicast(rank * kTileBytes, &map, full, 0,
                                static_cast<int>(rank * kTileRows), 3);
        }
        if (threadIdx.x >= 32) {
          mbarrier_wait(full, step & 1);
          const float value = shared_array<float>()[threadIdx.x] +
                              shared_array<float>()[threadIdx.x + kTileBytes / 4];
          CHECK(value == 2 || missing_edge != "");
          if (!missing("warp barrier")) __syncwarp();
          if (threadIdx.x < 34) mbarrier_arrive_cluster(empty, threadIdx.x - 32);
        }
      }
      sync_cluster();
    });
  };
  expect_clean(run);
  expect_diagnosis("warp barrier", run);
}

// wgmma reads operands that threads wrote: proxy fence and barrier before it, its wait before the
// operands are overwritten.
TEST(wgmma_operands) {
  const auto run = [] {
    launch(race_launch(1, 128, 16384), [] {
      constexpr uint32_t kAddressB = 2048;
      auto* halves = shared_array<uint16_t>();
      for (uint32_t i = threadIdx.x; i < (2048 + 256) / 2; i += 128)
        halves[i] = 0x3C00;  // 1 in fp16
      if (!missing("proxy fence")) fence_proxy_async_shared();
      if (!missing("barrier")) __syncthreads();
      const auto descriptor = [](uint32_t address) {  // no swizzle: 8x8 cores of 128 bytes, k cores
                                                      // 128 apart, row cores 256
        return uint64_t{address >> 4} | uint64_t{128 >> 4} << 16 | uint64_t{256 >> 4} << 32;
      };
      float d[4];
      wgmma_fence();
      wgmma_ss({Format::kFloat16, 8, Major::kK, Major::kK}, d, descriptor(0), descriptor(kAddressB),
               false);
      wgmma_commit_group();
      if (!missing("wait")) wgmma_wait_group(0);
      if (!missing("wait")) {
        // One thread speaks for the warpgroup: its group completes as a whole.
        if (threadIdx.x == 0)
          for (uint32_t i = 0; i < (2048 + 256) / 2; ++i) halves[i] = 0;
        CHECK(d[0] == 16 || missing_edge != "");
      } else {
        halves[threadIdx.x] = 0;
        wgmma_wait_group(0);
      }
    });
  };
  expect_clean(run);
  expect_race("proxy fence", "no fence.proxy.async", run);
  expect_race("barrier", "unordered", run);
  expect_race("wait", "unordered", run);
}

}  // namespace
}  // namespace emulator::selftest
