#include "emulator/ptx/shadow.h"

namespace emulator::ptx {
namespace {

bool performed(const Accessor& by, uint32_t agent, uint32_t time) {
  return by.performed != nullptr && agent < by.performed->size() && time <= (*by.performed)[agent];
}

}  // namespace

void Shadow::begin(uint32_t bytes, uint32_t agents, uint32_t warps, bool race) {
  state_.assign(bytes, kUndefined);
  agents_ = agents, warps_ = warps, race_ = race;
  if (!race) return;
  writers_.assign(bytes / kCell + 1, {});
  reads_.assign((bytes / kCell + 1) * static_cast<size_t>(agents), 0);
}

std::string Shadow::unordered(const char* what, const char* before, uint32_t at,
                              uint32_t agent) const {
  return format("%s of shared byte %u after an unordered %s by %s %u of the cluster", what, at,
                before, agent < warps_ ? "warp" : "the copies of block",
                agent < warps_ ? agent : agent - warps_);
}

std::string Shadow::read(uint32_t at, uint32_t bytes, const Accessor& by) {
  if (in_flight(at, bytes))
    return format("read of shared byte %u, which a copy in flight writes", at);
  if (!race_) return "";
  for (uint32_t cell = at / kCell; cell <= (at + bytes - 1) / kCell; ++cell) {
    const Cell& last = writers_[cell];
    const Clock& known = last.agent < warps_ ? *by.clock : *by.others;
    // Lanes of its own warp are ordered where they have met since, a lane always.
    const bool ordered = last.agent == by.agent && !by.proxy
                             ? last.lane == by.lane || last.time < by.synchronised
                             : last.time <= known[last.agent];
    if (last.time != 0 && !ordered) return unordered("read", "write", cell * kCell, last.agent);
    reads_[cell * static_cast<size_t>(agents_) + by.agent] = by.time * 2 + by.proxy;
  }
  return "";
}

std::string Shadow::write(uint32_t at, uint32_t bytes, const Accessor& by) {
  if (in_flight(at, bytes))
    return format("write of shared byte %u, which a copy in flight writes", at);
  if (!race_) return "";
  for (uint32_t cell = at / kCell; cell <= (at + bytes - 1) / kCell; ++cell) {
    Cell& last = writers_[cell];
    const Clock& known = last.agent < warps_ ? *by.clock : *by.others;
    const bool own = last.agent == by.agent && by.agent < warps_;
    const bool over = last.agent >= warps_ && performed(by, last.agent, last.time);
    if (last.time != 0 && !own && !over && last.time > known[last.agent])
      return unordered("write", "write", cell * kCell, last.agent);
    uint32_t* reads = &reads_[cell * static_cast<size_t>(agents_)];
    for (uint32_t agent = 0; agent < agents_; ++agent) {
      const uint32_t time = reads[agent] / 2;
      const bool over = reads[agent] % 2 != 0 && performed(by, agent, time);
      if (agent != by.agent && time > (*by.others)[agent] && !over)
        return unordered("write", "read", cell * kCell, agent);
      reads[agent] = 0;
    }
    last = {by.time, static_cast<uint16_t>(by.agent), static_cast<uint16_t>(by.lane)};
  }
  return "";
}

}  // namespace emulator::ptx
