// Warp-wide operations: the last lane of the mask to arrive performs the operation for all of them.
#pragma once
#include <bit>
#include <type_traits>

#include "emulator/machine/scheduler.h"

namespace emulator {

/// The operands that the lanes of a collective brought.
template <class Operand>
class LaneOperands {
 public:
  LaneOperands(Warp& warp, uint32_t mask) : warp(warp), mask(mask) {}
  Operand& operator[](uint32_t lane) const { return *static_cast<Operand*>(warp.operands[lane]); }
  /// Calls f(lane, operand) for every participating lane, in order.
  template <class F>
  void for_each(F&& f) const {
    for (uint32_t rest = mask; rest != 0; rest &= rest - 1) {
      const auto lane = static_cast<uint32_t>(std::countr_zero(rest));
      f(lane, (*this)[lane]);
    }
  }
  Warp& warp;
  const uint32_t mask;
};

/// Registers the current lane. Returns the slot if it is the last of the mask to arrive, after
/// which the caller performs the operation and calls collective_finish; otherwise waits until that
/// has happened and returns null. Fails when lanes of one warp are at different operations, or at
/// the same one with different immediates.
Collective* collective_arrive(uint32_t mask, const char* name, uint64_t immediate, void* operand);
/// Lets the lanes go on, or parks all of them on `park_on`.
void collective_finish(Collective& collective, Waitable* park_on);

/// Performs `action(LaneOperands<Operand>)` once all lanes of `mask` have called with the same name
/// and immediate. If the action returns a Waitable*, and it is not null, all lanes then wait for
/// that.
template <class Operand, class Action>
void warp_collective(uint32_t mask, const char* name, uint64_t immediate, Operand& operand,
                     Action&& action) {
  Collective* collective = collective_arrive(mask, name, immediate, &operand);
  if (collective == nullptr) return;
  const LaneOperands<Operand> lanes(*current_thread().warp, mask);
  Waitable* park_on = nullptr;
  if constexpr (std::is_convertible_v<std::invoke_result_t<Action, LaneOperands<Operand>>,
                                      Waitable*>) {
    park_on = action(lanes);
  } else {
    action(lanes);
  }
  collective_finish(*collective, park_on);
}

/// The mask of an .aligned instruction: all lanes of the warp; fails if one has exited.
uint32_t aligned_mask(const char* name);

/// %laneid.
uint32_t lane_index();
void syncwarp(uint32_t mask);
uint32_t ballot(uint32_t mask, bool predicate);
/// elect.sync of a whole warp: which lane is not said, but the same one throughout a launch.
bool elect_sync();

enum class Shuffle { Index, Up, Down, Xor };
/// The 64 bits of the source lane's value (__shfl_*_sync).
uint64_t shuffle_bits(Shuffle kind, uint32_t mask, uint64_t value, uint32_t argument, int width);

}  // namespace emulator
