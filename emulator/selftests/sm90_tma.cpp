// TMA loads and multicasts against a plain placement of elements, and misused.
#include "emulator/counts/counters.h"
#include "emulator/selftests/sm90_tiles.h"

namespace {

using namespace emulator;
using namespace emulator::selftest;

TEST(load_places_every_element) {
  for (const Tiling& tiling : kTilings) {
    const uint32_t bytes = tiling.box_bytes(), bar = bytes + 1024;
    const auto source = pattern(tiling.pitch() * tiling.height, 1);
    GlobalBuffer<unsigned char> tensor(source, "tensor"), out(bytes, "out");
    const CUtensorMap map = tiling.map(tensor.data());
    for (const Corner corner : kCorners) {
      const int32_t x0 = corner.chunks * tiling.chunk();
      const auto kernel = [&] {
        init_mbarriers(bar, {1});
        if (threadIdx.x == 0) {
          prefetch_tensor_map(&map);
          mbarrier_arrive_expect_tx(bar, bytes);
          tma_load_2d(1024, &map, bar, x0, corner.y);
        }
        mbarrier_wait(bar, 0);
        copy_out(1024, bytes, out.data());
      };
      const auto check = [&] {
        for (uint32_t row = 0; row < tiling.rows; ++row) {
          for (uint32_t column = 0; column < tiling.columns; ++column) {
            const int64_t x = x0 + int64_t{column}, y = corner.y + int64_t{row};
            for (uint32_t byte = 0; byte < tiling.element_bytes; ++byte) {
              const unsigned char expected =
                  tiling.inside(x, y) ? source[y * tiling.pitch() + x * tiling.element_bytes + byte]
                                      : 0;
              if (out[tiling.place(row, column, byte)] != expected) {
                throw Failure(format("tiling %td corner (%d,%d): row %u column %u",
                                     &tiling - kTilings, x0, corner.y, row, column));
              }
            }
          }
        }
      };
      for_each_completion([&] {
        launch(blocks_of(kThreads, bar + 8), kernel);
        check();
      });
    }
  }
}

// Each block loads its half of two tiles into all blocks; each waits for both halves.
TEST(multicast_reaches_every_block) {
  Fixture f;
  constexpr uint32_t kBlocks = 2;
  GlobalBuffer<unsigned char> out(kBlocks * kBlocks * kTileBytes, "out");
  const auto kernel = [&] {
    const uint32_t rank = cluster_rank();
    init_mbarriers_of_cluster(kBar, {1});
    if (threadIdx.x == 0) {
      mbarrier_arrive_expect_tx(kBar, kBlocks * kTileBytes);
      tma_load_2d_multicast(rank * kTileBytes, &f.map, kBar, 0, int(rank) * 16, 3);
    }
    mbarrier_wait(kBar, 0);
    copy_out(0, kBlocks * kTileBytes, out.data() + rank * kBlocks * kTileBytes);
    sync_cluster();
  };
  run_everywhere(blocks_of(kThreads, kShared, kBlocks), kernel, [&] {
    for (uint32_t block = 0; block < kBlocks; ++block) {
      for (uint32_t row = 0; row < 2 * 16; ++row) {
        for (uint32_t column = 0; column < 64; ++column) {
          const uint32_t at = kTile.place(row, column, 1);
          CHECK(out[block * kBlocks * kTileBytes + at] ==
                f.tensor[row * kTile.pitch() + column * 2 + 1]);
        }
      }
    }
  });
}

TEST(requested_bytes_count_once_and_inside_only) {
  Fixture f;
  reset_counters();
  launch(blocks_of(kThreads, kShared, 2), [&] {
    init_mbarriers_of_cluster(kBar, {1});
    if (threadIdx.x == 0) {
      mbarrier_arrive_expect_tx(kBar, kTileBytes);
      // 56 of 64 columns and 10 of 16 rows lie inside.
      if (cluster_rank() == 0) tma_load_2d_multicast(0, &f.map, kBar, -8, 54, 3);
    }
    mbarrier_wait(kBar, 0);
    sync_cluster();
  });
  CHECK(counters().global_bytes[int(GlobalAccess::TmaLoad)] == 56 * 2 * 10);
}

TEST(multicast_to_one_peer_alone) {
  Fixture f;
  GlobalBuffer<unsigned char> out(kTileBytes, "out");
  run_everywhere(blocks_of(kThreads, kShared, 2), [&] {
    const uint32_t rank = cluster_rank();
    init_mbarriers_of_cluster(kBar, {1});
    if (threadIdx.x == 0 && rank == 0) tma_load_2d_multicast(0, &f.map, kBar, 0, 0, 2);
    if (threadIdx.x == 0 && rank == 1) mbarrier_arrive_expect_tx(kBar, kTileBytes);
    if (rank == 1) {
      mbarrier_wait(kBar, 0);
      copy_out(0, kTileBytes, out.data());
    }
    sync_cluster();
  });
  CHECK(out[kTile.place(3, 5, 0)] == f.tensor[3 * kTile.pitch() + 5 * 2]);
}

// One thread of one block loads with these arguments.
void load(const CUtensorMap& map, uint32_t dst, uint32_t bar, uint32_t expected_bytes = kTileBytes,
          int y = 0, int x = 0) {
  launch(blocks_of(1, kShared), [&] {
    expect_bytes(expected_bytes);
    tma_load_2d(dst, &map, bar, x, y);
    mbarrier_wait(kBar, 0);
  });
}

TEST(misused_loads) {
  Fixture f;
  load(f.map, 1024, kBar);
  Tiling small = kTile;
  small.rows = 8;
  CHECK_FAILS(kMisuse, "is not 128-byte aligned", load(small.map(f.tensor.data()), 64, kBar));
  CHECK_FAILS(kMisuse, "expected a multiple of 1024", load(f.map, 128, kBar));
  CHECK_FAILS(kMisuse, "lie outside", load(f.map, kShared / 1024 * 1024, kBar));
  CHECK_FAILS(kMisuse, "holds no mbarrier", load(f.map, 1024, kBar + 8));
  CHECK_FAILS(kMisuse, "names rank 1", load(f.map, 1024, kBar | 2u << kRankShift));
  CHECK_FAILS(kMisuse, "holds no tensor map", load(CUtensorMap{}, 1024, kBar));
  for (const int x : {-5, 1, 60})
    CHECK_FAILS(kMisuse, "a multiple of 16 bytes", load(f.map, 1024, kBar, kTileBytes, 0, x));
  CHECK_FAILS(ErrorKind::Deadlock, "tx-count 16 bytes", load(f.map, 1024, kBar, kTileBytes + 16));
  CHECK_FAILS(kMisuse, "was overwritten", load(f.map, kBar, kBar));

  Tiling narrow = kTile;
  narrow.columns = 32;
  CHECK_FAILS(kMisuse, "the layout of narrower rows",
              load(narrow.map(f.tensor.data()), 1024, kBar, kTileBytes / 2));
  Tiling beyond = kTile;
  beyond.height = 200;
  CHECK_FAILS(kMisuse, "tensor", load(beyond.map(f.tensor.data()), 0, kBar, kTileBytes, 60));
}

TEST(load_needs_a_fenced_mbarrier) {
  Fixture f;
  CHECK_FAILS(kMisuse, "has not executed fence_mbarrier_init", launch(blocks_of(1, kShared), [&] {
                mbarrier_init(kBar, 1);
                mbarrier_arrive_expect_tx(kBar, kTileBytes);
                tma_load_2d(0, &f.map, kBar, 0, 0);
                mbarrier_wait(kBar, 0);
              }));
}

TEST(expecting_too_few_bytes_shows) {
  const KeepConfig keep;
  Fixture f;
  config().completion = Completion::Random;
  for (config().seed = 1; config().seed <= 10; ++config().seed) {
    // Half of the box lands first: the phase then completes too early, or never.
    GlobalBuffer<unsigned char> out(kTileBytes, "out");
    CHECK(goes_wrong([&] {
      launch(blocks_of(kThreads, kShared), [&] {
        init_mbarriers(kBar, {1});
        if (threadIdx.x == 0) {
          mbarrier_arrive_expect_tx(kBar, kTileBytes / 2);
          tma_load_2d(0, &f.map, kBar, 0, 0);
        }
        mbarrier_wait(kBar, 0);
        copy_out(0, kTileBytes, out.data());
      });
      return true;
    }));
  }
}

TEST(load_not_waited_for) {
  Fixture f;
  for_each_completion([&] {
    CHECK_FAILS(ErrorKind::ExitCheck, "", launch(blocks_of(1, kShared), [&] {
                  expect_bytes();
                  tma_load_2d(0, &f.map, kBar, 0, 0);
                  for (int i = 0; i < 100; ++i) yield();
                }));
  });
}

TEST(destination_in_flight_is_poison) {
  Fixture f;
  launch(blocks_of(1, kShared), [&] {
    expect_bytes();
    fill_tile(1);
    tma_load_2d(0, &f.map, kBar, 0, 0);
#ifndef EMULATOR_RACE  // where looking is a race
    CHECK(dynamic_shared_memory()[5] == kPoisonByte);
#endif
    mbarrier_wait(kBar, 0);
  });
}

TEST(misused_multicasts) {
  Fixture f;
  const auto multicast = [&](uint16_t mask) {
    launch(blocks_of(32, kShared, 2), [&, mask] {
      init_mbarriers_of_cluster(kBar, {1});
      if (threadIdx.x == 0) {
        if (cluster_rank() == 0) tma_load_2d_multicast(0, &f.map, kBar, 0, 0, mask);
        mbarrier_arrive_expect_tx(kBar, kTileBytes);
      }
      mbarrier_wait(kBar, 0);
      sync_cluster();
    });
  };
  multicast(3);
  CHECK_FAILS(kMisuse, "block mask 0x0", multicast(0));
  CHECK_FAILS(kMisuse, "block mask 0x5", multicast(5));
  CHECK_FAILS(ErrorKind::Deadlock, "of rank 1", multicast(1));
  CHECK_FAILS(kMisuse, "different blocks", launch(blocks_of(1, kShared, 2), [&] {
                init_mbarriers_alone(kBar, {1});
                tma_load_2d(0, &f.map, map_shared(kBar, cluster_rank() ^ 1), 0, 0);
              }));
}

TEST(multicast_into_a_block_that_has_exited) {
  Fixture f;
  CHECK_FAILS(kMisuse, "has exited", launch(blocks_of(32, kShared, 2), [&] {
                init_mbarriers_of_cluster(kBar, {1});
                if (cluster_rank() == 1 || threadIdx.x != 0) return;
                wait_until_exited(1);
                tma_load_2d_multicast(0, &f.map, kBar, 0, 0, 2);
              }));
}

TEST(multicast_in_flight_when_a_block_exits) {
  Fixture f;
  bool issued = false;
  CHECK_FAILS(ErrorKind::ExitCheck, "TMA multicast load", launch(blocks_of(32, kShared, 2), [&] {
                init_mbarriers_of_cluster(kBar, {1});
                if (cluster_rank() == 0 && threadIdx.x == 0) {
                  tma_load_2d_multicast(0, &f.map, kBar, 0, 0, 2);
                  issued = true;
                }
                while (cluster_rank() == 1 && !issued) yield();
              }));
}

}  // namespace
