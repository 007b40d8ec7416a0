// The counters against kernels whose traffic is known by hand.
#include "emulator/counts/counters.h"

#include "emulator/selftests/race_kernels.h"
#include "ptx/matrix_move.h"
#include "ptx/mma.h"
#include "ptx/tma.h"

namespace emulator::selftest {
namespace {

using namespace lora_ext;

uint64_t global_bytes(GlobalAccess kind) { return counters().global_bytes[static_cast<int>(kind)]; }

// Rows of 16 bytes at a pitch of 128 bytes all begin in bank 0: eight passes for a phase, seven too
// many. At a pitch of 16 they fill the banks.
TEST(matrix_loads_count_their_bank_conflicts) {
  const auto load = [](uint32_t pitch) {
    reset_counters();
    launch(race_launch(1, 32, 4096), [pitch] {
      for (uint32_t i = threadIdx.x; i < 1024; i += 32) shared_array<uint32_t>()[i] = 0;
      __syncwarp();
      uint32_t registers[2];
      ptx::ldmatrix_x2_trans(registers, (threadIdx.x % 16) * pitch);
      __syncwarp();
      ptx::stmatrix_x4(threadIdx.x * 16, {registers[0], registers[0], registers[1], registers[1]});
    });
  };
  load(128);
  CHECK(counters().matrix_phases == 2 + 4);
  CHECK(counters().matrix_conflicts == 2 * 7);
  load(16);
  CHECK(counters().matrix_phases == 2 + 4);
  CHECK(counters().matrix_conflicts == 0);
  load(32);  // rows 0 and 4 share their banks, and so on
  CHECK(counters().matrix_conflicts == 2);
}

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

// A box of 8 x 32 floats of which 5 columns lie outside, to both blocks of a cluster: counted once,
// without what is outside.
TEST(a_multicast_counts_once) {
  GlobalBuffer<float> source(8 * 32, "source");
  source.fill(1);
  CUtensorMap map;
  const cuuint64_t dims[] = {32, 8}, strides[] = {128};
  const cuuint32_t box[] = {32, 8}, steps[] = {1, 1};
  CHECK(encode_tensor_map_tiled(&map, CU_TENSOR_MAP_DATA_TYPE_FLOAT32, 2, source.data(), dims,
                                strides, box, steps, CU_TENSOR_MAP_INTERLEAVE_NONE,
                                CU_TENSOR_MAP_SWIZZLE_NONE, CU_TENSOR_MAP_L2_PROMOTION_NONE,
                                CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE) == CUDA_SUCCESS);
  constexpr uint32_t kBar = 2048, kBytes = 8 * 32 * 4;
  reset_counters();
  launch(race_launch(2, 32, 4096, 2), [&] {
    if (threadIdx.x == 0) {
      mbarrier_init(kBar, 1);
      fence_mbarrier_init();
    }
    cluster_arrive();
    cluster_wait();
    if (threadIdx.x == 0) {
      mbarrier_arrive_expect_tx(kBar, kBytes);
      if (cluster_rank() == 0) tma_load_2d_multicast(0, &map, kBar, 5, 0, 3);
      mbarrier_wait(kBar, 0);
    }
    cluster_arrive();
    cluster_wait();
  });
  CHECK(global_bytes(GlobalAccess::TmaLoad) == 8 * 27 * 4);
}

TEST(tensor_core_operations_count) {
  reset_counters();
  launch(race_launch(1, 64), [] {
    float d[4] = {};
    const uint32_t a[4] = {}, b[2] = {};
    ptx::mma_m16n8k16<__half>(d, a, b);
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
