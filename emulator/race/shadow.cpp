// Checks and remembers accesses to shadow cells; the rules of which accesses conflict are in
// ordered() and the two checks.
#include "emulator/race/shadow.h"

#include <algorithm>
#include <cstring>

#include "emulator/machine/config.h"
#include "emulator/race/report.h"

namespace emulator::race {
namespace {

constexpr uintptr_t kPageBytes = 4096;
constexpr size_t kMemoEntries = 1 << 14;
constexpr uint32_t kUnchecked = ~0u;  // no index of an access
constexpr uint32_t kNoMemo = ~0u;

bool both_atomic(const Access& earlier, const Actor& actor) {
  return (earlier.flags & kAtomic) && (actor.flags & kAtomic);
}

}  // namespace

Shadow::Shadow() : pages_(kCachedPages), memo_(kMemoEntries) { begin_launch(); }

void Shadow::begin_launch() {
  accesses_.assign(kHostWrite + 1, Access{});
  accesses_[kHostWrite].flags = kHost | kBothBytes;
  memo_.assign(kMemoEntries, Memo{});
  for (auto& region : regions_) {
    const auto* bytes = reinterpret_cast<const unsigned char*>(region->begin);
    const size_t last_byte = region->end - region->begin - 1;
    for (size_t i = 0; i < region->cells.size(); ++i) {
      Cell& cell = region->cells[i];
      // The host fills buffers through plain pointers: what is no longer poison was written.
      const bool written = cell.write || bytes[i * kCellBytes] != kPoisonByte ||
                           bytes[std::min(i * kCellBytes + 1, last_byte)] != kPoisonByte;
      cell = {written ? kHostWrite : 0, 0};
    }
  }
}

void Shadow::add(const void* memory, size_t bytes, size_t guard_bytes, Space space,
                 std::string name, bool initialised) {
  remove(memory);
  auto region = std::make_unique<Region>();
  region->begin = reinterpret_cast<uintptr_t>(memory);
  region->end = region->begin + bytes;
  region->guard_bytes = guard_bytes;
  region->space = space;
  region->name = std::move(name);
  region->cells.assign((bytes + kCellBytes - 1) / kCellBytes, {initialised ? kHostWrite : 0, 0});
  auto at = std::upper_bound(
      regions_.begin(), regions_.end(), region->begin,
      [](uintptr_t begin, const std::unique_ptr<Region>& other) { return begin < other->begin; });
  pages_.assign(kCachedPages, {});
  regions_.insert(at, std::move(region));
}

void Shadow::remove(const void* memory) {
  const auto begin = reinterpret_cast<uintptr_t>(memory);
  if (std::erase_if(regions_, [&](const auto& region) { return region->begin == begin; }))
    pages_.assign(kCachedPages, {});
}

Region* Shadow::find(const void* memory) {
  // Most instrumented accesses are to stacks: the cache answers them with "no region" in a few
  // instructions.
  const auto address = reinterpret_cast<uintptr_t>(memory);
  const uintptr_t page = address / kPageBytes;
  CachedPage& cached = pages_[page % kCachedPages];
  const auto holds = [&](const Region* region) {
    return region && region->reaches(address, address);
  };
  if (cached.page == page && (!cached.region || holds(cached.region))) return cached.region;
  const uintptr_t first = page * kPageBytes, last = first + kPageBytes - 1;
  Region* found = nullptr;
  // A buffer's guard bytes may begin in the page before it: look one region further.
  auto at = std::upper_bound(
      regions_.begin(), regions_.end(), last + kPageBytes,
      [](uintptr_t limit, const std::unique_ptr<Region>& region) { return limit < region->begin; });
  while (at != regions_.begin() && !holds(found)) {
    Region* candidate = (--at)->get();
    if (candidate->reaches(first, last))
      found = candidate;
    else if (candidate->end + candidate->guard_bytes < first)
      break;
  }
  cached = {page, found};
  return holds(found) ? found : nullptr;
}

void Shadow::host_wrote(const void* memory, size_t bytes) {
  for_runs(Actor(), true, memory, bytes, [](Region&, Cell* cell, size_t count, uint8_t) {
    std::fill_n(cell, count, Cell{kHostWrite, 0});
  });
}

// Calls run(region, first cell, number of cells, mask): at most three runs, for an odd first byte,
// whole cells and an odd last byte.
template <class Run>
void Shadow::for_runs(const Actor& actor, bool writes, const void* memory, size_t bytes, Run run) {
  Region* region = find(memory);
  if (!region) return;
  const auto address = reinterpret_cast<uintptr_t>(memory);
  if (address < region->begin || address + bytes > region->end)
    return report_fault(Fault::OutOfBounds, *region, address - region->begin, actor, Access{},
                        writes, false);
  uintptr_t first = address - region->begin;
  const uintptr_t last = first + bytes;
  if (first % kCellBytes && first < last) {
    run(*region, &region->cells[first / kCellBytes], size_t{1}, uint8_t{kHighByte});
    ++first;
  }
  const size_t whole = (last - first) / kCellBytes;
  if (first < last && whole)
    run(*region, &region->cells[first / kCellBytes], whole, uint8_t{kBothBytes});
  if (first < last && last % kCellBytes)
    run(*region, &region->cells[last / kCellBytes], size_t{1}, uint8_t{kLowByte});
}

bool Shadow::ordered(const Access& earlier, const Actor& actor, Space space, bool earlier_wrote,
                     bool writes) const {
  if (earlier.flags & kHost) return true;
  // The async proxy sees a generic write only through a proxy fence; reads that it overwrites need
  // none.
  const View* proxy = actor.through_proxy[static_cast<int>(space)];
  if (proxy && earlier_wrote && !(earlier.flags & kAsyncProxy))
    return proxy->knows(earlier.agent, earlier.epoch);
  return earlier.agent == actor.id || actor.seen->knows(earlier.agent, earlier.epoch) ||
         (writes && actor.performed->knows(earlier.agent, earlier.epoch));
}

void Shadow::check_write_before(const Region& region, const Cell& cell, const Actor& actor,
                                uint8_t mask, bool writes) const {
  const size_t offset = static_cast<size_t>(&cell - region.cells.data()) * kCellBytes;
  if ((cell.write & kInFlight) && !(actor.flags & kAsynchronous))
    report_fault(Fault::InFlight, region, offset, actor, access(cell.write), writes, true);
  const uint32_t index = cell.write & ~kInFlight;
  if (index == 0) {
    if (!writes && !(cell.write & kInFlight))
      report_fault(Fault::Uninitialised, region, offset, actor, Access{}, writes, true);
    return;
  }
  const Access& earlier = accesses_[index];
  if ((earlier.flags & mask) && !both_atomic(earlier, actor) &&
      !ordered(earlier, actor, region.space, true, writes))
    report_fault(Fault::Conflict, region, offset, actor, earlier, writes, true);
}

void Shadow::check_reads_before(const Region& region, const Cell& cell, const Actor& actor,
                                uint8_t mask) const {
  for (uint32_t index = cell.reads; index; index = accesses_[index].previous) {
    const Access& earlier = accesses_[index];
    if ((earlier.flags & mask) && !both_atomic(earlier, actor) &&
        !ordered(earlier, actor, region.space, false, true))
      report_fault(Fault::Conflict, region,
                   static_cast<size_t>(&cell - region.cells.data()) * kCellBytes, actor, earlier,
                   true, false);
  }
}

// The index of an access record; the same access to other cells with the same history gets the same
// record.
uint32_t Shadow::remember(const Actor& actor, uint8_t mask, uint32_t previous, uint32_t memo_head) {
  Access access{actor.id,          actor.epoch, previous,
                actor.instruction, actor.site,  static_cast<uint8_t>(actor.flags | mask)};
  const size_t hash = (memo_head * 0x9E3779B1u) ^ (actor.id.index * 0x85EBCA77u) ^
                      (actor.id.block * 0xC2B2AE3Du) ^ (actor.epoch * 0x27D4EB2Fu) ^ mask;
  Memo& memo = memo_[(hash ^ hash >> 15) % kMemoEntries];
  const Access& known = memo.access;
  if (memo.result && memo.head == memo_head && known.agent == access.agent &&
      known.epoch == access.epoch && known.flags == access.flags &&
      known.instruction == access.instruction && known.site == access.site)
    return memo.result;
  accesses_.push_back(access);
  memo = {memo_head, static_cast<uint32_t>(accesses_.size() - 1), access};
  return memo.result;
}

uint32_t Shadow::with_reader(uint32_t reads, const Actor& actor, uint8_t mask) {
  // A read that happened before this one need not be kept: what is ordered after this one is
  // ordered after it too. An atomic read does not stand for a plain one, nor a byte for a whole
  // cell.
  constexpr int kSearched = 32;
  const uint8_t flags = static_cast<uint8_t>(actor.flags | mask);
  uint32_t kept = reads;
  int searched = 0;
  for (uint32_t index = reads; index && searched < kSearched;
       index = accesses_[index].previous, ++searched) {
    const Access& earlier = accesses_[index];
    if (earlier.agent == actor.id && earlier.epoch == actor.epoch && earlier.flags == flags)
      return reads;
    const bool stands_for = !((actor.flags & kAtomic) && !(earlier.flags & kAtomic)) &&
                            ((earlier.flags & kBothBytes) & ~mask) == 0;
    if (index == kept && stands_for &&
        (earlier.agent == actor.id || actor.seen->knows(earlier.agent, earlier.epoch)))
      kept = earlier.previous;
  }
  return remember(actor, mask, kept, reads);
}

void Shadow::collect() {
  std::vector<uint32_t> moved_to(accesses_.size(), 0);
  constexpr uint32_t kReached = 1;
  moved_to[0] = moved_to[kHostWrite] = kReached;
  for (const auto& region : regions_)
    for (const Cell& cell : region->cells) {
      moved_to[cell.write & ~kInFlight] = kReached;
      for (uint32_t index = cell.reads; index && !moved_to[index];
           index = accesses_[index].previous)
        moved_to[index] = kReached;
    }
  // An access refers to older ones only, which have smaller indices and so have moved before it.
  uint32_t kept = 0;
  for (size_t index = 0; index < accesses_.size(); ++index) {
    if (!moved_to[index]) continue;
    accesses_[kept] = accesses_[index];
    accesses_[kept].previous = moved_to[accesses_[kept].previous];
    moved_to[index] = kept++;
  }
  accesses_.resize(kept);
  for (auto& region : regions_)
    for (Cell& cell : region->cells)
      cell = {moved_to[cell.write & ~kInFlight] | (cell.write & kInFlight), moved_to[cell.reads]};
  memo_.assign(kMemoEntries, Memo{});
  collect_at_ = std::max(kCollectAtLeast, 2 * accesses_.size());
}

void Shadow::read(const Actor& actor, const void* memory, size_t bytes) {
  if (accesses_.size() > collect_at_) collect();
  for_runs(actor, false, memory, bytes,
           [&](Region& region, Cell* cell, size_t count, uint8_t mask) {
             uint32_t checked_write = kUnchecked, known_reads = kUnchecked, next_reads = 0;
             for (Cell* const end = cell + count; cell != end; ++cell) {
               if (cell->write != checked_write) {
                 check_write_before(region, *cell, actor, mask, false);
                 checked_write = cell->write;
               }
               if (cell->reads != known_reads) {
                 known_reads = cell->reads;
                 next_reads = with_reader(known_reads, actor, mask);
               }
               cell->reads = next_reads;
             }
           });
}

void Shadow::write(const Actor& actor, const void* memory, size_t bytes) {
  if (accesses_.size() > collect_at_) collect();
  for_runs(actor, true, memory, bytes, [&](Region& region, Cell* cell, size_t count, uint8_t mask) {
    const uint32_t record = remember(actor, mask, 0, kNoMemo);
    uint32_t checked_write = kUnchecked, checked_reads = 0;
    for (Cell* const end = cell + count; cell != end; ++cell) {
      if (cell->write != checked_write) {
        check_write_before(region, *cell, actor, mask, true);
        checked_write = cell->write;
      }
      if (cell->reads != checked_reads) {
        check_reads_before(region, *cell, actor, mask);
        checked_reads = cell->reads;
      }
      // An atomic write leaves the reads: it is not ordered after atomic ones. (Bits in flight
      // survive the operation's own writes.)
      *cell = {record | (cell->write & kInFlight), actor.flags & kAtomic ? cell->reads : 0};
    }
  });
}

void Shadow::set_in_flight(const Actor& actor, const void* memory, size_t bytes, bool on) {
  for_runs(actor, true, memory, bytes, [&](Region& region, Cell* cell, size_t count, uint8_t) {
    for (Cell* const end = cell + count; cell != end; ++cell) {
      if (on && (cell->write & kInFlight))
        report_fault(Fault::InFlight, region,
                     static_cast<size_t>(cell - region.cells.data()) * kCellBytes, actor,
                     access(cell->write), true, true);
      cell->write = on ? cell->write | kInFlight : cell->write & ~kInFlight;
    }
  });
}

}  // namespace emulator::race
