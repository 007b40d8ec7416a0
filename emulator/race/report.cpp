// Interning of sites, and the text of a report; see report.h.
#include "emulator/race/report.h"

#include <cstring>
#include <unordered_set>

#include "emulator/machine/fail.h"
#include "emulator/race/checker.h"
#include "emulator/race/symbolise.h"

namespace emulator::race {
namespace {

struct SameSite {
  size_t operator()(const Site& site) const {
    size_t hash = reinterpret_cast<size_t>(site.what);
    for (const void* frame : site.frames)
      hash = (hash ^ reinterpret_cast<size_t>(frame)) * 0x9E3779B97F4A7C15ull;
    return hash ^ hash >> 29;
  }
  bool operator()(const Site& left, const Site& right) const {
    return left.what == right.what &&
           std::memcmp(left.frames, right.frames, sizeof left.frames) == 0;
  }
};

const Site* interned(const Site& site) {
  static std::unordered_set<Site, SameSite, SameSite> sites;
  return &*sites.insert(site).first;
}

std::string position(const void* instruction, const Site* site) {
  if (instruction) return kernel_position({instruction});
  if (!site) return "an unknown place";
  return kernel_position(std::vector<const void*>(site->frames, site->frames + Site::kFrames));
}

std::string verb(uint8_t flags, const Site* site, bool writes) {
  std::string text = flags & kAtomic ? "atomic " : "";
  text += writes ? "write" : "read";
  if (site) text += std::string(" (") + site->what + ")";
  return text;
}

std::string memory_name(const Region& region, size_t offset) {
  if (region.space == Space::Global)
    return format("global buffer '%s', byte %td", region.name.c_str(),
                  static_cast<ptrdiff_t>(offset));
  for (const auto& cluster : machine().resident)
    for (const auto& block : cluster->blocks)
      if (reinterpret_cast<uintptr_t>(block->shared) == region.begin)
        return format("shared memory of block (%u,%u,%u), address 0x%zx", block->index.x,
                      block->index.y, block->index.z, offset);
  return format("shared memory, address 0x%zx", offset);
}

// What would have ordered the two accesses.
std::string missing_edge(const Actor& actor, const Access& earlier, bool earlier_wrote) {
  const bool was_asynchronous = earlier.flags & kAsynchronous;
  if (earlier_wrote && (actor.flags & kAsyncProxy) && !(earlier.flags & kAsyncProxy) &&
      actor.seen->knows(earlier.agent, earlier.epoch))
    return "they are ordered, but no fence.proxy.async lies between the write and the operation of "
           "the async proxy";
  if (was_asynchronous)
    return "the operation's completion was not waited for, or no barrier passes it on to this "
           "access";
  if (actor.flags & kAsynchronous)
    return "no barrier or flag orders the earlier access before the operation was issued";
  if ((actor.flags & kAtomic) != (earlier.flags & kAtomic))
    return "an atomic access and a plain one, and no barrier, release and acquire, or fences order "
           "them";
  return "no barrier, release and acquire, or fences order them";
}

const char* kind_of_conflict(bool writes, bool earlier_wrote) {
  if (writes) return earlier_wrote ? "write after unordered write" : "write after unordered read";
  return "read after unordered write";
}

}  // namespace

[[gnu::noinline]] const Site* call_site(const char* what) {
  Site site;
  site.what = what;
  // The chain of saved frame pointers of the System V ABI; a fiber's outermost frame holds zero.
  constexpr uintptr_t kLargestFrame = 64 * 1024;
  auto* frame = static_cast<void* const*>(__builtin_frame_address(0));
  for (const void*& address : site.frames) {
    address = frame[1];
    auto* next = static_cast<void* const*>(frame[0]);
    const auto distance = reinterpret_cast<uintptr_t>(next) - reinterpret_cast<uintptr_t>(frame);
    if (!next || distance > kLargestFrame || distance % sizeof(void*)) break;
    frame = next;
  }
  return interned(site);
}

const Site* site_with_name(const Site& site, const char* what) {
  Site named = site;
  named.what = what;
  return interned(named);
}

void report_peer_access(const std::string& block, AgentId agent, const Site* site) {
  if (!checker().raises_faults()) return;
  checker().fault(
      ErrorKind::Race,
      "the end of " + block + ", unordered after an access to its shared memory\n    " +
          format("%s by %s\n      in %s", site->what, checker().agents.name(agent).c_str(),
                 position(nullptr, site).c_str()) +
          "\n    missing: a barrier of the cluster between the two");
}

void report_fault(Fault fault, const Region& region, size_t offset, const Actor& actor,
                  const Access& earlier, bool writes, bool earlier_wrote) {
  if (!checker().raises_faults()) return;
  const std::string memory = memory_name(region, offset);
  const std::string here = format(
      "\n    %s by %s\n      in %s", verb(actor.flags, actor.site, writes).c_str(),
      checker().agents.name(actor.id).c_str(), position(actor.instruction, actor.site).c_str());
  const auto there = [&] {
    return format("\n    earlier %s by %s\n      in %s",
                  verb(earlier.flags, earlier.site, earlier_wrote).c_str(),
                  earlier.flags & kHost ? "the host" : checker().agents.name(earlier.agent).c_str(),
                  position(earlier.instruction, earlier.site).c_str());
  };
  switch (fault) {
    case Fault::OutOfBounds:
      checker().fault(
          ErrorKind::Misuse,
          format("access outside of the %zu bytes of ", region.end - region.begin) + memory + here);
      return;
    case Fault::Uninitialised:
      checker().fault(ErrorKind::Uninitialised,
                      "read of memory that nothing has written: " + memory + here);
      return;
    case Fault::InFlight:
      checker().fault(
          ErrorKind::Race,
          "access to the destination of an asynchronous operation in flight: " + memory + here +
              "\n    missing: the wait for that operation's completion");
      return;
    case Fault::Conflict:
      checker().fault(ErrorKind::Race, std::string(kind_of_conflict(writes, earlier_wrote)) + ": " +
                                           memory + here + there() + "\n    missing: " +
                                           missing_edge(actor, earlier, earlier_wrote));
  }
}

}  // namespace emulator::race
