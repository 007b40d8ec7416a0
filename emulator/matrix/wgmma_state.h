// What one warp has in flight of the wgmmas of its warpgroup.
#pragma once

#include <array>
#include <cstdint>
#include <deque>
#include <memory>
#include <string>
#include <vector>

#include "emulator/machine/machine.h"
#include "emulator/matrix/wgmma_arithmetic.h"

namespace emulator {

/// The accumulator registers of the 32 lanes, n / 2 each, named by their addresses.
struct WgmmaRegisters {
  std::array<float*, kWarpSize> lanes{};
  int n = 0;

  bool operator==(const WgmmaRegisters&) const = default;
  bool overlaps(const WgmmaRegisters& other) const;
  uint64_t hash() const;
};

/// Accumulators in flight: the values have left the registers, which hold poison.
struct WgmmaAccumulator {
  WgmmaRegisters registers;
  uint64_t last_group = 0;    ///< the latest group that uses it
  std::vector<float> values;  ///< [16, n], the rows of this warp

  void take_from_registers();
  /// Fails if the registers of `lane` have been written meanwhile.
  void give_to_registers(uint32_t lane) const;
};

/// One warp's share of a wgmma.
struct WgmmaOperation {
  WgmmaShape shape;
  bool a_in_registers;
  uint64_t a, b;  ///< descriptors
  bool accumulate;
  WgmmaAccumulator* accumulator;
  AsyncAgent agent;
  std::array<const uint32_t*, kWarpSize> a_registers{};
  std::array<std::array<uint32_t, 4>, kWarpSize> a_fragments{};  ///< their values at issue

  bool same_instruction(const WgmmaOperation& other) const;
  std::string describe() const;
  /// Reads the operands and updates the accumulator.
  void execute(Warp& warp) const;
};

/// The end of a group in all four warps: what wgmma.wait_group waits for.
struct WgmmaCompletion final : Waitable {
  uint32_t warpgroup = 0;
  uint64_t index = 0;  ///< in the order of commits
  uint32_t warps_committed = 0, shares_executed = 0;
  char sync_object = 0;

  bool started() const { return warps_committed == kWarpgroupWarps; }
  bool complete() const { return shares_executed == kWarpgroupWarps; }
  std::string describe() const override;
  ~WgmmaCompletion() override { race_forget(&sync_object); }
};

/// One warp's share of a group.
struct WgmmaGroup {
  uint64_t index = 0;
  std::vector<WgmmaOperation> operations;
  size_t executed = 0;
  bool share_executed = false;
  std::shared_ptr<WgmmaCompletion> completion;  ///< common to the four warps
};

/// Registers that ldmatrix has written since the last fence: `count` of each lane.
struct WgmmaLoadedRegisters {
  std::array<const uint32_t*, kWarpSize> lanes{};
  uint32_t count = 0;

  /// Whether the fragments of A are among them.
  bool overlaps(const WgmmaOperation& operation) const;
};
/// Called by ldmatrix. Fails if a wgmma in flight reads one of the registers.
void wgmma_registers_loaded(Warp& warp, const WgmmaLoadedRegisters& registers);

struct WarpWgmma final : Extension {
  bool fenced = false;
  std::vector<WgmmaLoadedRegisters> loaded;        ///< since the last fence
  std::vector<WgmmaOperation> open;                ///< in no group yet
  std::deque<std::unique_ptr<WgmmaGroup>> groups;  ///< committed, not waited for; oldest first
  uint64_t committed = 0;                          ///< groups so far
  bool executing = false;                          ///< an engine operation of this warp is queued
  char issue_object = 0;                           ///< what the lanes knew when they issued
  uint32_t lanes_waited = 0;                       ///< that have passed the current wait_group
  std::array<uint64_t, kWarpSize> waited_for{};    ///< per lane: groups that a wait has covered
  std::vector<std::unique_ptr<WgmmaAccumulator>> in_flight;

  /// Accumulators of earlier waits with their hashes at the last fence: a write after the fence and
  /// before a wgmma that accumulates shows.
  struct Finished {
    WgmmaRegisters registers;
    uint64_t hash;
  };
  std::vector<Finished> finished;

  void thread_exits(Thread& thread) override;
  ~WarpWgmma() override { race_forget(&issue_object); }
};

WarpWgmma& wgmma_state(Warp& warp);

}  // namespace emulator
