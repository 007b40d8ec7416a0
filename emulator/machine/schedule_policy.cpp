// The three schedules and the freezing of warps.
#include "emulator/machine/schedule_policy.h"

#include <algorithm>
#include <bit>

namespace emulator {

SchedulePolicy g_policy;

uint32_t draw_priority() { return kDrawnPriorities | machine().rng(); }

void set_ready(Warp& warp, uint32_t lanes) {
  Machine& m = machine();
  if (warp.ready == 0) {
    warp.ready_slot = static_cast<int32_t>(m.ready_warps.size());
    m.ready_warps.push_back(&warp);
    // Under priorities a warp that becomes ready displaces a lesser one at the next opportunity.
    if (m.config.schedule == Schedule::Priority && m.current != nullptr &&
        warp.priority > m.current->warp->priority) {
      g_policy.return_to_scheduler = true;
    }
  }
  warp.ready |= lanes;
}

Thread& take_ready_lane(Warp& warp) {
  const uint32_t rotated = std::rotr(warp.ready, static_cast<int>(warp.rotation));
  const uint32_t lane =
      (static_cast<uint32_t>(std::countr_zero(rotated)) + warp.rotation) % kWarpSize;
  warp.ready &= ~(1u << lane);
  if (warp.ready == 0) {
    auto& warps = machine().ready_warps;
    warps[static_cast<size_t>(warp.ready_slot)] = warps.back();
    warps.back()->ready_slot = warp.ready_slot;
    warps.pop_back();
  }
  return *warp.threads[lane];
}

namespace {

Warp* pick_by_priority() {
  Machine& m = machine();
  Warp* best = nullptr;
  for (Warp* warp : m.ready_warps) {
    if (g_policy.frozen.contains(*warp)) continue;
    if (best == nullptr || warp->priority > best->priority) best = warp;
  }
  constexpr uint32_t kTurnsPerPriorityChange = 256;
  if (best != nullptr && m.rng.one_in(kTurnsPerPriorityChange)) best->priority = draw_priority();
  return best;
}

Warp* pick_at_random() {
  Machine& m = machine();
  const auto count = static_cast<uint32_t>(m.ready_warps.size());
  const uint32_t first = m.rng.below(count);
  for (uint32_t i = 0; i < count; ++i) {
    Warp* warp = m.ready_warps[(first + i) % count];
    if (!g_policy.frozen.contains(*warp)) return warp;
  }
  return nullptr;
}

Warp* pick_last() {
  const Warp* last = g_policy.last;
  if (last == nullptr || last->ready == 0 || g_policy.frozen.contains(*last)) return nullptr;
  return machine().ready_warps[static_cast<size_t>(last->ready_slot)];
}

}  // namespace

Warp* pick_warp() {
  switch (machine().config.schedule) {
    case Schedule::RunAhead:
      if (Warp* last = pick_last()) return last;
      break;
    case Schedule::Random:
      break;
    case Schedule::Priority:
      return pick_by_priority();
  }
  return pick_at_random();
}

void update_freeze() {
  Machine& m = machine();
  if (!m.config.freeze) return;
  Frozen& frozen = g_policy.frozen;
  if (frozen.block != nullptr) {
    if (--frozen.turns == 0) frozen = {};
    return;
  }
  constexpr uint32_t kTurnsBetweenFreezes = 64, kMaxTurnsFrozen = 512;
  if (!m.rng.one_in(kTurnsBetweenFreezes)) return;
  const Warp& warp = *m.ready_warps[m.rng.below(static_cast<uint32_t>(m.ready_warps.size()))];
  frozen.block = warp.block;
  frozen.first = frozen.last = warp.index;
  if (!m.rng.one_in(4)) {
    frozen.first = warp.warpgroup() * kWarpgroupWarps;
    frozen.last = frozen.first + kWarpgroupWarps - 1;
  }
  frozen.turns = 1 + m.rng.below(kMaxTurnsFrozen);
}

void thaw() { g_policy.frozen = {}; }

uint32_t turn_length() {
  Machine& m = machine();
  uint32_t length = ~0u;
  if (m.config.schedule == Schedule::Random) length = m.rng.below(2 * kWarpSize);
  if (m.config.completion == Completion::Random && !m.operations.empty()) {
    length = std::min(length, m.rng.below(kWarpSize));
  }
  return length;
}

}  // namespace emulator
