// The counters against kernels whose traffic is known by hand. The tests of the matrix units and of
// TMA have others.
#include "emulator/counts/counters.h"

#include "emulator/selftests/race_kernels.h"
#include "ptx/mma.h"

namespace emulator::selftest {
namespace {

uint64_t global_bytes(GlobalAccess kind) { return counters().global_bytes[static_cast<int>(kind)]; }

TEST(cp_async_and_atomics_count_their_bytes) {
  GlobalBuffer<float> source(128, "source");
  source.fill(1);
  GlobalBuffer<uint32_t> sum(1, "sum");
  sum.fill(0);
  reset_counters();
  launch(race_launch(2, 32), [&] {
    cp_async_16(threadIdx.x * 16, source.data() + threadIdx.x * 4, threadIdx.x < 8 ? 16 : 4);
    cp_async_commit_group();
    cp_async_wait_group(0);
    atomicAdd(sum.data(), 1u);
    __syncthreads();
  });
  CHECK(global_bytes(GlobalAccess::CpAsync) == 2 * (8 * 16 + 24 * 4));
  CHECK(global_bytes(GlobalAccess::Atomic) == 2 * 32 * 4);
}

TEST(tensor_core_operations_count) {
  reset_counters();
  launch(race_launch(1, 64), [] {
    float d[4] = {};
    const uint32_t a[4] = {}, b[2] = {};
    lora_ext::ptx::mma_m16n8k16<__half>(d, a, b);
  });
  CHECK(counters().mma_flop == 2 * 2 * 16 * 8 * 16);
  CHECK(counters().wgmma_flop == 0);
}

#ifdef EMULATOR_RACE

TEST(plain_global_accesses_count_their_bytes) {
  GlobalBuffer<uint16_t> from(64, "from");
  GlobalBuffer<uint16_t> to(64, "to");
  from.fill(1);
  reset_counters();
  launch(race_launch(1, 64), [&] { to[threadIdx.x] = from[threadIdx.x]; });
  CHECK(global_bytes(GlobalAccess::Load) == 128);
  CHECK(global_bytes(GlobalAccess::Store) == 128);
}

#endif

}  // namespace
}  // namespace emulator::selftest
