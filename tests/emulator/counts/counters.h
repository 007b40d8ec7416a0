// What a launch asked of the machine: bank conflicts, global bytes, tensor-core operations,
// barriers.
//
// The units of the layer count as they execute; counts add up until reset_counters(). Plain loads
// and stores of kernel code are seen only by the race build, where the compiler reports them.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>

#include "emulator/counts/l2_model.h"

namespace emulator {

enum class GlobalAccess { CpAsync, TmaLoad, TmaStore, Load, Store, Atomic };
inline constexpr int kGlobalAccesses = 6;
enum class BarrierKind { Named, Cluster, Warp, MbarrierArrive, MbarrierWait };
inline constexpr int kBarrierKinds = 5;

struct Counters {
  // ldmatrix and stmatrix move eight rows of 16 bytes, all 32 banks once, in a phase; each further
  // pass over the banks is a conflict.
  uint64_t matrix_phases = 0, matrix_conflicts = 0;
  // Plain accesses to shared memory, in requests of 32 lanes x 4, 16 x 8 or 8 x 16 bytes, and their
  // further passes over the banks. An access has the width that the host compiler gives it: it may
  // split what nvcc loads as one vector.
  uint64_t shared_requests = 0, shared_conflicts = 0;
  // Bytes by GlobalAccess. A multicast load counts once; a load's bytes outside the tensor do not
  // count.
  uint64_t global_bytes[kGlobalAccesses] = {};
  uint64_t mma_flop = 0, wgmma_flop = 0;  // 2 m n k
  // Arrivals by BarrierKind: threads for barriers, calls for mbarriers.
  uint64_t barriers[kBarrierKinds] = {};
  uint64_t early_blocks = 0;  // of a stream's last grid, begun while a block before it still ran
  L2Traffic l2;               // all zero without use_l2_model()

  uint64_t total_global_bytes() const;
  std::string table() const;
  std::string json() const;
};

// What has been counted since reset_counters().
Counters counters();
void reset_counters();

// From now on global accesses also pass through a model of L2. counters() includes the write-back
// of what is still dirty.
void use_l2_model(const L2Config& config);
void stop_l2_model();

// ---- called by the units ------------------------------------------------------------------------

// The shared addresses of the eight rows of one 8x8 matrix.
void count_matrix_phase(const uint32_t (&addresses)[8]);
void count_global(GlobalAccess kind, const void* pointer, size_t bytes);
void count_mma(uint64_t flop);
void count_wgmma(uint64_t flop);
void count_barrier(BarrierKind kind);
void count_early_block();

// One lane's plain access to shared memory. Lanes run one after the other, so requests are put
// together from the n-th executions of one instruction by the lanes of a warp; where lanes of a
// warp take a loop unequally often this pairs the wrong ones.
void count_shared(const void* warp, uint32_t lane, const void* instruction, uint32_t address,
                  uint32_t bytes);

}  // namespace emulator
