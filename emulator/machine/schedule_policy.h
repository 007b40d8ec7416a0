// Which warp and which lane runs next: the schedules, and the freezing of warps.
#pragma once
#include "emulator/machine/machine.h"

namespace emulator {

/// Warps [first, last] of a block that are not scheduled for some turns more.
struct Frozen {
  const Block* block = nullptr;
  uint32_t first = 0, last = 0, turns = 0;
  bool contains(const Warp& warp) const {
    return block == warp.block && first <= warp.index && warp.index <= last;
  }
};

/// Priorities from here on are drawn; those below are given to warps that yield, each lower than
/// all before it.
inline constexpr uint32_t kDrawnPriorities = 1u << 31;
uint32_t draw_priority();

struct SchedulePolicy {
  uint32_t switches_left = 0;        ///< between lanes, until the scheduler picks a warp again
  bool return_to_scheduler = false;  ///< at the next opportunity
  bool yielded = false;              ///< the thread of this turn has asked for others
  const Warp* last = nullptr;  ///< the warp of the last turn, if it is alive and has not yielded
  uint32_t lowest_priority = kDrawnPriorities;  ///< of a warp that yielded
  Frozen frozen;
};
extern SchedulePolicy g_policy;

void set_ready(Warp& warp, uint32_t lanes);
/// One of the warp's ready lanes, which is not ready any more.
Thread& take_ready_lane(Warp& warp);

/// The warp whose turn is next, or null if all that are ready are frozen; at least one must be
/// ready.
Warp* pick_warp();
/// Now and then freezes a warp or a warpgroup that is ready.
void update_freeze();
void thaw();
/// How many switches between lanes the turn of a warp lasts.
uint32_t turn_length();

}  // namespace emulator
