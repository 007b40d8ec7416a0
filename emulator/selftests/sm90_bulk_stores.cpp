// TMA stores against a plain placement of elements, bulk groups, and both misused.
#include "emulator/selftests/sm90_tiles.h"

namespace {

using namespace emulator;
using namespace emulator::selftest;

// The last chunk of 16 bytes that has an element inside is written whole.
TEST(store_writes_every_chunk_inside_and_nothing_else) {
  for (const Tiling& tiling : kTilings) {
    const uint32_t bytes = tiling.box_bytes();
    const auto before = pattern(tiling.pitch() * tiling.height, 2), tile = pattern(bytes, 3);
    GlobalBuffer<unsigned char> tensor(before, "tensor"), source(tile, "tile");
    const CUtensorMap map = tiling.map(tensor.data());
    for (const Corner corner : kCorners) {
      const int32_t x0 = corner.chunks * tiling.chunk();
      std::copy(before.begin(), before.end(), tensor.begin());
      launch(blocks_of(kThreads, bytes), [&] {
        for (uint32_t i = threadIdx.x; i < bytes; i += kThreads) {
          dynamic_shared_memory()[i] = source[i];
        }
        fence_proxy_async_shared();
        syncthreads();
        if (threadIdx.x == 0) {
          tma_store_2d(&map, 0, x0, corner.y);
          bulk_commit_group();
          bulk_wait_group(0);
        }
      });
      auto expected = before;
      for (uint32_t row = 0; row < tiling.rows; ++row) {
        for (uint32_t column = 0; column < tiling.columns; ++column) {
          const int64_t x = x0 + int64_t{column}, y = corner.y + int64_t{row};
          if (x < 0 || !tiling.inside(x - x % tiling.chunk(), y)) continue;
          for (uint32_t byte = 0; byte < tiling.element_bytes; ++byte) {
            expected[y * tiling.pitch() + x * tiling.element_bytes + byte] =
                tile[tiling.place(row, column, byte)];
          }
        }
      }
      CHECK(tensor.to_vector() == expected);
    }
  }
}

void store_tile(const CUtensorMap& map, int y = 0) {
  tma_store_2d(&map, 0, 0, y);
  bulk_commit_group();
}

TEST(source_may_be_overwritten_once_read) {
  Fixture f;
  run_everywhere(
      blocks_of(1, kShared),
      [&] {
        for (int tile = 0; tile < 4; ++tile) {
          bulk_wait_group_read(0);
          fill_tile(static_cast<unsigned char>(10 + tile));
          store_tile(f.map, tile * 16);
        }
        bulk_wait_group(0);
      },
      [&] {
        for (int row = 0; row < 64; ++row)
          CHECK(f.tensor[row * kTile.pitch() + 9] == 10 + row / 16);
      });
}

#ifndef EMULATOR_RACE  // where these are races
TEST(source_overwritten_too_early) {
  Fixture f;
  launch(blocks_of(1, kShared), [&] {
    fill_tile(1);
    store_tile(f.map);
    fill_tile(2);
    bulk_wait_group(0);
  });
  CHECK(f.tensor[0] == 2);
}

TEST(read_does_not_mean_written) {
  Fixture f;
  f.tensor[0] = 77;
  launch(blocks_of(1, kShared), [&] {
    fill_tile(1);
    store_tile(f.map);
    bulk_wait_group_read(0);
    CHECK(f.tensor[0] == 77);
    bulk_wait_group(0);
    CHECK(f.tensor[0] == 1);
  });
}
#endif

TEST(groups_are_waited_for_in_order) {
  Fixture f;
  run_everywhere(blocks_of(1, kShared), [&] {
    fill_tile(5);
    for (int tile = 0; tile < 3; ++tile) store_tile(f.map, tile * 16);
    bulk_wait_group(1);
    CHECK(f.tensor[0] == 5 && f.tensor[16 * kTile.pitch()] == 5);
    bulk_wait_group(5);
    bulk_commit_group();  // an empty group
    bulk_wait_group(0);
    CHECK(f.tensor[32 * kTile.pitch()] == 5);
  });
}

TEST(groups_not_waited_for) {
  Fixture f;
  const auto store_and = [&](const std::function<void()>& rest) {
    launch(blocks_of(1, kShared), [&] {
      fill_tile(1);
      tma_store_2d(&f.map, 0, 0, 0);
      rest();
    });
  };
  const auto kExit = ErrorKind::ExitCheck;
  CHECK_FAILS(kExit, "1 TMA stores in no bulk group", store_and([] {}));
  CHECK_FAILS(kExit, "in no bulk group", store_and([] { bulk_wait_group(0); }));
  CHECK_FAILS(kExit, "without bulk_wait_group_read<0>", store_and([] { bulk_commit_group(); }));
  CHECK_FAILS(kExit, "without bulk_wait_group_read<0>", store_and([] {
                bulk_commit_group();
                bulk_wait_group(1);
              }));
  store_and([] {  // the end of the grid waits for the writes
    bulk_commit_group();
    bulk_wait_group_read(0);
  });
}

TEST(groups_are_of_one_thread) {
  Fixture f;
  CHECK_FAILS(ErrorKind::ExitCheck, "thread 0", launch(blocks_of(32, kShared), [&] {
                if (threadIdx.x == 0) fill_tile(1);
                syncthreads();
                if (threadIdx.x == 0) {
                  store_tile(f.map);
                }
                syncthreads();
                if (threadIdx.x == 1) bulk_wait_group(0);
              }));
}

TEST(misused_stores) {
  Fixture f;
  const auto store = [](const CUtensorMap& map, uint32_t src, int32_t y = 0, int32_t x = 0) {
    launch(blocks_of(1, kShared), [&] {
      for (uint32_t i = 0; i < kShared; ++i) dynamic_shared_memory()[i] = 1;
      fence_proxy_async_shared();
      tma_store_2d(&map, src, x, y);
      bulk_commit_group();
      bulk_wait_group(0);
    });
  };
  store(f.map, 1024);
  CHECK_FAILS(kMisuse, "expected a multiple of 1024", store(f.map, 512));
  CHECK_FAILS(kMisuse, "lie outside", store(f.map, kShared - 1024));
  CHECK_FAILS(kMisuse, "reaches its own block only", store(f.map, 1024 | 1u << 25));
  CHECK_FAILS(kMisuse, "holds no tensor map", store(CUtensorMap{}, 1024));
  CHECK_FAILS(kMisuse, "a multiple of 16 bytes", store(f.map, 1024, 0, 4));
  Tiling beyond = kTile;
  beyond.height = 200;
  CHECK_FAILS(kMisuse, "tensor", store(beyond.map(f.tensor.data()), 0, 60));
}

}  // namespace
