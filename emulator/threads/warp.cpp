// How lanes gather for a collective, and the collectives that move no matrices.
#include "emulator/threads/warp.h"

#include <cstring>

namespace emulator {
namespace {

bool same_name(const char* a, const char* b) { return a == b || std::strcmp(a, b) == 0; }

// The slot of the pending operation with this mask, or a free one. Pending masks may overlap (16
// lanes wait for the whole warp while the others still shuffle among themselves), unless each waits
// for a lane that has arrived at the other.
Collective& find_slot(Warp& warp, uint32_t mask, uint32_t lane, const char* name) {
  Collective* found = nullptr;
  Collective* free_slot = nullptr;
  uint32_t arrived = 1u << lane;
  for (uint32_t i = 0; i < warp.collectives_used; ++i) {
    Collective& slot = warp.collectives[i];
    if (slot.arrived == 0) {
      if (free_slot == nullptr) free_slot = &slot;
    } else if (slot.mask == mask) {
      found = &slot;
      arrived |= slot.arrived;
    }
  }
  for (uint32_t i = 0; i < warp.collectives_used; ++i) {
    const Collective& slot = warp.collectives[i];
    if (&slot == found || (slot.arrived & mask) == 0 || (slot.mask & arrived) == 0) continue;
    fail(ErrorKind::Misuse,
         "divergent warp: lanes %08x are at %s with mask %08x, lanes %08x are at %s with mask %08x",
         arrived, name, mask, slot.arrived, slot.name, slot.mask);
  }
  if (found != nullptr) return *found;
  return free_slot != nullptr ? *free_slot : warp.collectives[warp.collectives_used++];
}

}  // namespace

std::string Collective::describe() const {
  return format("%s: lanes %08x of %08x have arrived (alive: %08x)", name, arrived, mask,
                warp->alive);
}

Collective* collective_arrive(uint32_t mask, const char* name, uint64_t immediate, void* operand) {
  Thread& self = current_thread();
  Warp& warp = *self.warp;
  if ((mask >> self.lane & 1) == 0) {
    fail(ErrorKind::Misuse, "%s: the calling lane %u is not in the mask %08x", name, self.lane,
         mask);
  }
  if ((mask & ~warp.alive) != 0) {
    fail(ErrorKind::Misuse, "%s with mask %08x: lanes %08x do not exist or have exited", name, mask,
         mask & ~warp.alive);
  }
  Collective& slot = find_slot(warp, mask, self.lane, name);
  if (slot.arrived == 0) {
    slot.mask = mask;
    slot.name = name;
    slot.immediate = immediate;
  } else if (!same_name(slot.name, name)) {
    fail(ErrorKind::Misuse, "divergent warp: this lane is at %s, lanes %08x are at %s", name,
         slot.arrived, slot.name);
  } else if (slot.immediate != immediate) {
    fail(ErrorKind::Misuse,
         "%s: this lane's immediate operands (0x%llx) differ from those of lanes %08x (0x%llx)",
         name, static_cast<unsigned long long>(immediate), slot.arrived,
         static_cast<unsigned long long>(slot.immediate));
  }
  warp.operands[self.lane] = operand;
  slot.arrived |= 1u << self.lane;
  if (slot.arrived == mask) return &slot;
  self.waiting_on = &slot;
  suspend();
  return nullptr;
}

void collective_finish(Collective& collective, Waitable* park_on) {
  Machine& m = machine();
  Warp& warp = *m.current->warp;
  const uint32_t mask = collective.mask;
  collective.arrived = 0;
  while (warp.collectives_used > 0 && warp.collectives[warp.collectives_used - 1].arrived == 0) {
    --warp.collectives_used;
  }
  warp.rotation = m.rng.below(kWarpSize);
  if (park_on == nullptr) {
    make_lanes_ready(warp, mask);
  } else {
    for (uint32_t rest = mask; rest != 0; rest &= rest - 1) {
      park(*warp.threads[static_cast<uint32_t>(std::countr_zero(rest))], *park_on);
    }
  }
  suspend();
}

uint32_t aligned_mask(const char* name) {
  const Warp& warp = *current_thread().warp;
  if (warp.alive != warp.lanes) {
    fail(ErrorKind::Misuse, "%s needs all lanes of the warp, but lanes %08x have exited", name,
         warp.lanes & ~warp.alive);
  }
  return warp.lanes;
}

uint32_t lane_index() { return current_thread().lane; }

void syncwarp(uint32_t mask) {
  struct {
  } none;
  warp_collective(mask, "__syncwarp", 0, none, [](const auto& lanes) {
    auto mode = ReleaseMode::Replace;
    lanes.for_each([&](uint32_t lane, auto&) {
      race_release(*lanes.warp.threads[lane], &lanes.warp.syncwarp_object, mode);
      mode = ReleaseMode::Join;
    });
    lanes.for_each([&](uint32_t lane, auto&) {
      race_acquire(*lanes.warp.threads[lane], &lanes.warp.syncwarp_object);
    });
  });
}

uint32_t ballot(uint32_t mask, bool predicate) {
  struct Vote {
    bool predicate;
    uint32_t result;
  } vote{predicate, 0};
  warp_collective(mask, "vote.ballot", 0, vote, [](const LaneOperands<Vote>& lanes) {
    uint32_t result = 0;
    lanes.for_each([&](uint32_t lane, Vote& v) { result |= uint32_t(v.predicate) << lane; });
    lanes.for_each([&](uint32_t, Vote& v) { v.result = result; });
  });
  return vote.result;
}

bool elect_sync() {
  bool elected = false;
  warp_collective(aligned_mask("elect.sync"), "elect.sync", 0, elected, [](const auto& lanes) {
    lanes[static_cast<uint32_t>(machine().config.seed % std::popcount(lanes.mask))] = true;
  });
  return elected;
}

uint64_t shuffle_bits(Shuffle kind, uint32_t mask, uint64_t value, uint32_t argument, int width) {
  if (width < 1 || width > 32 || !std::has_single_bit(static_cast<uint32_t>(width))) {
    fail(ErrorKind::Misuse, "shfl.sync: width %d is not a power of two up to 32", width);
  }
  struct Operand {
    uint64_t value, result;
    uint32_t source;
  };
  // PTX ISA, shfl.sync: a source outside of the segment leaves the lane its own value.
  const uint32_t lane = current_thread().lane, segment = static_cast<uint32_t>(width);
  const uint32_t first = lane & ~(segment - 1), last = first + segment - 1;
  uint32_t source = lane;
  switch (kind) {
    case Shuffle::Index:
      source = first + argument % segment;
      break;
    case Shuffle::Up:
      source = lane >= first + argument ? lane - argument : lane;
      break;
    case Shuffle::Down:
      source = argument <= last - lane ? lane + argument : lane;
      break;
    case Shuffle::Xor:
      source = (lane ^ argument) <= last ? lane ^ argument : lane;
      break;
  }
  constexpr const char* kNames[] = {"shfl.sync.idx", "shfl.sync.up", "shfl.sync.down",
                                    "shfl.sync.bfly"};
  Operand operand{value, value, source};
  warp_collective(mask, kNames[static_cast<int>(kind)], static_cast<uint64_t>(width), operand,
                  [](const LaneOperands<Operand>& lanes) {
                    lanes.for_each([&](uint32_t, Operand& o) {
                      if ((lanes.mask >> o.source & 1) == 0) {
                        fail(ErrorKind::Misuse,
                             "shfl.sync reads lane %u, which is not in the mask %08x", o.source,
                             lanes.mask);
                      }
                      o.result = lanes[o.source].value;
                    });
                  });
  return operand.result;
}

}  // namespace emulator
