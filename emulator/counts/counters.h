// What a launch asked of the machine: bank conflicts, global bytes, tensor-core operations.
//
// The units of the layer count as they execute; counts add up until reset_counters(). Programs hold
// kernels to them: what is read once more than it must be fails. Plain loads and stores of kernel
// code are seen only by the race build, where the compiler reports them.
#pragma once

#include <cstddef>
#include <cstdint>

namespace emulator {

enum class GlobalAccess { CpAsync, TmaLoad, TmaStore, Load, Store, Atomic };
inline constexpr int kGlobalAccesses = 6;

struct Counters {
  // ldmatrix and stmatrix move eight rows of 16 bytes, all 32 banks once, in a phase; each further
  // pass over the banks is a conflict.
  uint64_t matrix_phases = 0, matrix_conflicts = 0;
  // Bytes by GlobalAccess. A multicast load counts once; a load's bytes outside the tensor do not
  // count.
  uint64_t global_bytes[kGlobalAccesses] = {};
  uint64_t mma_flop = 0, wgmma_flop = 0;  // 2 m n k
  uint64_t early_blocks = 0;  // of a stream's last grid, begun while a block before it still ran
};

// What has been counted since reset_counters().
Counters counters();
void reset_counters();

// ---- called by the units ------------------------------------------------------------------------

// The shared addresses of the eight rows of one 8x8 matrix.
void count_matrix_phase(const uint32_t (&addresses)[8]);
void count_global(GlobalAccess kind, size_t bytes);
void count_mma(uint64_t flop);
void count_wgmma(uint64_t flop);
void count_early_block();

}  // namespace emulator
