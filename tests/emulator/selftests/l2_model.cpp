// The L2 model against sequences whose traffic is counted by hand.
#include "emulator/counts/l2_model.h"

#include "emulator/selftests/selftest.h"

namespace {

using emulator::ErrorKind;
using emulator::L2Config;
using emulator::L2Model;

// Two lines A, B fit, C does not: A B A C evicts B, then A hits and B misses again.
TEST(least_recently_used_line_goes) {
  L2Model model(L2Config{2 * 128, 0});
  const uint64_t a = 0, b = 128, c = 256;
  for (uint64_t line : {a, b, a, c, a, b}) model.read(line, 4);
  CHECK(model.traffic().read_sectors == 6);
  CHECK(model.traffic().read_misses == 4);  // A B C B
  CHECK(model.traffic().dram_read_bytes == 4 * 32);
}

// A read of 100 bytes at offset 20 touches sectors 0..3 of a line; other sectors are not fetched
// with a line.
TEST(sectors_are_fetched_one_by_one) {
  L2Model model(L2Config{1024, 0});
  model.read(20, 100);
  CHECK(model.traffic().read_sectors == 4);
  model.read(128 + 31, 2);
  CHECK(model.traffic().read_misses == 6);
  model.read(128 + 96, 32);
  CHECK(model.traffic().read_misses == 7);
  model.read(0, 128);
  CHECK(model.traffic().read_misses == 7);
  CHECK(model.traffic().read_sectors == 4 + 2 + 1 + 4);
}

// Writes fetch nothing; a read of the rest of a partly written sector does; a dirty sector is
// written back once.
TEST(writes_are_kept_until_eviction) {
  L2Model model(L2Config{2 * 128, 0});
  model.write(0, 64);
  model.write(0, 64);
  model.write(64, 8);
  CHECK(model.traffic().write_sectors == 5);
  model.read(64, 8);
  CHECK(model.traffic().dram_read_bytes == 0);
  model.read(72, 4);
  CHECK(model.traffic().dram_read_bytes == 32);
  CHECK(model.traffic().dram_write_bytes == 0);
  model.read(128, 4);
  model.read(256, 4);
  CHECK(model.traffic().dram_write_bytes == 3 * 32);
  model.flush();
  CHECK(model.traffic().dram_write_bytes == 3 * 32);
}

// Two sets of one way: lines 0 and 2 share set 0 and evict each other, line 1 stays.
TEST(sets_evict_separately) {
  L2Model model(L2Config{2 * 128, 1});
  for (uint64_t line : {0, 1, 2, 0, 1}) model.read(line * 128, 32);
  CHECK(model.traffic().read_misses == 4);
}

// Two passes over twice the capacity: LRU hits nothing.
TEST(a_loop_larger_than_the_cache_always_misses) {
  L2Model model(L2Config{64 * 128, 0});
  for (int pass = 0; pass < 2; ++pass)
    for (uint64_t line = 0; line < 128; ++line) model.read(line * 128, 128);
  CHECK(model.traffic().read_misses == 2 * 128 * 4);
}

TEST(a_wrong_size_is_refused) {
  CHECK_FAILS(ErrorKind::Misuse, "L2 model: 1000 bytes", L2Model(L2Config{1000, 4}));
  CHECK_FAILS(ErrorKind::Misuse, "expected a positive multiple", L2Model(L2Config{0, 0}));
}

}  // namespace
