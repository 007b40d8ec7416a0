// ldmatrix, stmatrix and mma.sync, through csrc/ptx/, against the PTX ISA's words: r[j] of lane l
// holds elements 2(l % 4) and 2(l % 4) + 1 of row l / 4 of matrix j (of column l / 4, transposed);
// mma multiplies.
#include <cmath>
#include <vector>

#include "emulator/counts/counters.h"
#include "emulator/selftests/kernels.h"
#include "ptx/mma.h"
#include "ptx/thread.h"

namespace {

using namespace emulator;
using namespace emulator::selftest;
namespace ptx = lora_ext::ptx;

constexpr uint32_t kPitch = 80;  // bytes from row to row, which then do not share banks
constexpr uint32_t kShared = 32 * kPitch;

uint16_t* shared_row(uint32_t row) { return shared_array<uint16_t>(row * kPitch); }
uint32_t row_address(uint32_t lane) { return ptx::shared_address(shared_row(lane)); }

// Element (row, col) of matrix j in the tests.
uint16_t element(uint32_t j, uint32_t row, uint32_t col) {
  return static_cast<uint16_t>(1000 * j + 10 * row + col);
}
uint32_t expected_register(uint32_t j, uint32_t lane, bool transposed) {
  const uint32_t i = lane / 4, k = 2 * (lane % 4);
  const uint32_t low = transposed ? element(j, k, i) : element(j, i, k);
  const uint32_t high = transposed ? element(j, k + 1, i) : element(j, i, k + 1);
  return low | high << 16;
}

template <uint32_t kCount>
void expect_load(void (*load)(uint32_t (&)[kCount], uint32_t), bool transposed) {
  run_everywhere(blocks_of(32, kShared), [=] {
    const uint32_t lane = lane_index();
    for (uint32_t col = 0; col < 8; ++col) shared_row(lane)[col] = element(lane / 8, lane % 8, col);
    syncwarp(~0u);
    uint32_t r[kCount];
    // Lanes past the last matrix bring an address that must not be used.
    load(r, lane < 8 * kCount ? row_address(lane) : 0xFFFFFFFF);
    for (uint32_t j = 0; j < kCount; ++j) CHECK(r[j] == expected_register(j, lane, transposed));
  });
}

TEST(stmatrix_puts_each_element_in_its_row) {
  run_everywhere(blocks_of(32, kShared), [=] {
    const uint32_t lane = lane_index();
    for (uint32_t col = 0; col < 8; ++col) shared_row(lane)[col] = 0xABCD;
    syncwarp(~0u);
    uint32_t r[4];
    for (uint32_t j = 0; j < 4; ++j) r[j] = expected_register(j, lane, false);
    ptx::stmatrix_x4(row_address(lane), r);
    syncwarp(~0u);
    for (uint32_t col = 0; col < 8; ++col)
      CHECK(shared_row(lane)[col] == element(lane / 8, lane % 8, col));
  });
}

TEST(ldmatrix_gives_each_lane_its_elements) {
  expect_load<4>(ptx::ldmatrix_x4, false);
  expect_load<2>(ptx::ldmatrix_x2_trans, true);
  expect_load<4>(ptx::ldmatrix_x4_trans, true);
}

TEST(misuse_of_ldmatrix_fails) {
  const auto load_at = [](uint32_t offset) {
    launch(blocks_of(32, kShared), [=] {
      uint32_t r[4];
      ptx::ldmatrix_x4(r, row_address(lane_index()) + offset);
    });
  };
  CHECK_FAILS(ErrorKind::Misuse, "ldmatrix", load_at(8));
  CHECK_FAILS(ErrorKind::Misuse, "ldmatrix", load_at(kShared));
  CHECK_FAILS(ErrorKind::Misuse, "", launch(blocks_of(32, kShared), [] {
                uint32_t two[2], four[4], written[4] = {};
                const uint32_t address = row_address(lane_index());
                ptx::stmatrix_x4(address, written);
                syncwarp(~0u);
                if (lane_index() < 16) {
                  ptx::ldmatrix_x2_trans(two, address);
                } else {
                  ptx::ldmatrix_x4(four, address);
                }
              }));
  CHECK_FAILS(ErrorKind::ExitCheck, "ldmatrix", launch(blocks_of(32, kShared), [] {
                uint32_t r[2], written[4] = {};
                const uint32_t address = row_address(lane_index());
                ptx::stmatrix_x4(address, written);
                syncwarp(~0u);
                if (lane_index() != 31) ptx::ldmatrix_x2_trans(r, address);
              }));
}

// Rows of 16 bytes at a pitch of 128 bytes all begin in bank 0: eight passes for a phase, seven too
// many. At pitches of 16 and 80 they fill the banks.
TEST(bank_conflicts_are_counted) {
  const auto conflicts = [](uint32_t pitch) {
    reset_counters();
    launch(blocks_of(32, 32 * pitch), [=] {
      uint32_t four[4] = {}, two[2];
      ptx::stmatrix_x4(lane_index() * pitch, four);
      syncwarp(~0u);
      ptx::ldmatrix_x4(four, lane_index() * pitch);
      ptx::ldmatrix_x2_trans(two, lane_index() % 16 * pitch);
    });
    CHECK(counters().matrix_phases == 4 + 4 + 2);
    return counters().matrix_conflicts;
  };
  CHECK(conflicts(16) == 0);
  CHECK(conflicts(80) == 0);
  CHECK(conflicts(32) == 10 * 1);
  CHECK(conflicts(64) == 10 * 3);
  CHECK(conflicts(128) == 10 * 7);
}

// d[16, 8] += a[16, 16] b[16, 8] with fragments gathered and scattered by the words of the PTX ISA.
template <typename T>
void multiply(const std::vector<uint16_t>& a, const std::vector<uint16_t>& b,
              std::vector<float>& d) {
  const auto pair = [](uint16_t low, uint16_t high) { return low | uint32_t{high} << 16; };
  launch(blocks_of(32, 16), [&] {
    const uint32_t group = lane_index() / 4, k = 2 * (lane_index() % 4);
    uint32_t ra[4], rb[2];
    float rd[4];
    for (uint32_t i = 0; i < 4; ++i) {  // a0 (row g), a1 (row g + 8), a2, a3: 8 columns on
      const uint32_t at = (group + i % 2 * 8) * 16 + k + i / 2 * 8;
      ra[i] = pair(a[at], a[at + 1]);
    }
    for (uint32_t i = 0; i < 2; ++i) {
      const uint32_t at = (k + i * 8) * 8 + group;
      rb[i] = pair(b[at], b[at + 8]);
    }
    const auto place = [&](uint32_t i) { return (group + i / 2 * 8) * 8 + k + i % 2; };
    for (uint32_t i = 0; i < 4; ++i) rd[i] = d[place(i)];
    ptx::mma_m16n8k16<T>(rd, ra, rb);
    for (uint32_t i = 0; i < 4; ++i) d[place(i)] = rd[i];
  });
}

template <typename T>
void expect_product(uint64_t seed) {
  constexpr Format kFormat = format_of<T>();
  Rng rng(seed);
  const auto random = [&] { return static_cast<float>(static_cast<int32_t>(rng())) * 0x1p-31f; };
  std::vector<uint16_t> a(256), b(128);
  std::vector<float> d(128);
  for (uint16_t& value : a) value = from_float(kFormat, random());
  for (uint16_t& value : b) value = from_float(kFormat, random());
  for (float& value : d) value = random();
  const std::vector<float> before = d;
  multiply<T>(a, b, d);
  for (int row = 0; row < 16; ++row) {
    for (int col = 0; col < 8; ++col) {
      float in_order = before[row * 8 + col];
      double exact = in_order, magnitude = std::abs(in_order);
      for (int k = 0; k < 16; ++k) {
        const double product =
            double{to_float(kFormat, a[row * 16 + k])} * double{to_float(kFormat, b[k * 8 + col])};
        in_order = static_cast<float>(in_order + product);
        exact += product;
        magnitude += std::abs(product);
      }
      CHECK(d[row * 8 + col] == in_order);
      CHECK(std::abs(d[row * 8 + col] - exact) <= 16 * 0x1p-24 * magnitude);
    }
  }
}

TEST(mma_multiplies_with_one_rounding_a_step) {
  for (uint64_t seed = 1; seed <= 20; ++seed) {
    expect_product<__nv_bfloat16>(seed);
    expect_product<__half>(seed);
  }
}

TEST(mma_reads_the_format_it_was_told) {
  std::vector<uint16_t> a(256, float_to_float16(1.0f)), b(128, float_to_float16(2.0f));
  std::vector<float> half(128, 0.0f), brain(128, 0.0f);
  multiply<__half>(a, b, half);
  multiply<__nv_bfloat16>(a, b, brain);
  for (float value : half) CHECK(value == 32.0f);
  for (float value : brain) CHECK(value != 32.0f);
}

// -ftrivial-auto-var-init=pattern fills what a kernel forgets to clear with -1.7e38 (0xFE bytes).
TEST(an_accumulator_that_is_not_cleared_shows) {
  for (bool cleared : {true, false}) {
    launch(blocks_of(32, 16), [&] {
      float d[4];
      if (cleared)
        for (float& value : d) value = 0;
      const uint32_t a[4] = {}, b[2] = {};
      ptx::mma_m16n8k16<__half>(d, a, b);
      CHECK(cleared ? d[0] == 0 : std::abs(d[0]) > 1e38f);
    });
  }
}

}  // namespace
