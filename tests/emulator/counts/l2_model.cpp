// Sets of lines in order of use; see l2_model.h.
#include "emulator/counts/l2_model.h"

#include <algorithm>

#include "emulator/machine/fail.h"

namespace emulator {
namespace {

// Bits [first, last) of a sector's byte mask.
uint32_t byte_mask(uint32_t first, uint32_t last) {
  const auto below = [](uint32_t bit) { return bit == kSectorBytes ? ~0u : (1u << bit) - 1; };
  return below(last) & ~below(first);
}

}  // namespace

L2Model::L2Model(const L2Config& config) {
  const size_t lines = config.bytes / kLineBytes;
  ways_ = config.ways ? config.ways : static_cast<uint32_t>(lines);
  if (lines == 0 || config.bytes % (size_t{ways_} * kLineBytes) != 0)
    fail(ErrorKind::Misuse, "L2 model: %zu bytes; expected a positive multiple of ways x %u = %zu",
         config.bytes, kLineBytes, size_t{std::max(ways_, 1u)} * kLineBytes);
  sets_.resize(lines / ways_);
}

// Calls touch(sector, mask of its bytes) for every sector in the range.
template <class Touch>
void L2Model::for_sectors(uint64_t address, size_t bytes, Touch touch) {
  const uint64_t end = address + bytes;
  while (address < end) {
    const uint64_t sector_end = std::min(end, (address / kSectorBytes + 1) * kSectorBytes);
    const auto first = static_cast<uint32_t>(address % kSectorBytes);
    const auto last = first + static_cast<uint32_t>(sector_end - address);
    touch(line(address / kLineBytes).sectors[address / kSectorBytes % kLineSectors],
          byte_mask(first, last));
    address = sector_end;
  }
}

void L2Model::read(uint64_t address, size_t bytes) {
  for_sectors(address, bytes, [&](Sector& sector, uint32_t mask) {
    ++traffic_.read_sectors;
    if (sector.valid || (mask & ~sector.written) == 0) return;
    ++traffic_.read_misses;
    traffic_.dram_read_bytes += kSectorBytes;
    sector.valid = true;
  });
}

void L2Model::write(uint64_t address, size_t bytes) {
  for_sectors(address, bytes, [&](Sector& sector, uint32_t mask) {
    ++traffic_.write_sectors;
    sector.written |= mask;
  });
}

void L2Model::flush() {
  for (const auto& [number, index] : index_of_) write_back(lines_[index]);
  index_of_.clear();
  lines_.clear();
  free_.clear();
  sets_.assign(sets_.size(), Set{});
}

void L2Model::write_back(Line& line) {
  for (Sector& sector : line.sectors) {
    if (sector.written) traffic_.dram_write_bytes += kSectorBytes;
    sector = Sector{};
  }
}

L2Model::Line& L2Model::line(uint64_t number) {
  Set& set = sets_[number % sets_.size()];
  const auto found = index_of_.find(number);
  if (found != index_of_.end()) {
    if (set.newest != found->second) {
      unlink(set, found->second);
      link_newest(set, found->second);
    }
    return lines_[found->second];
  }
  if (set.lines == ways_) {
    const uint32_t victim = set.oldest;
    write_back(lines_[victim]);
    index_of_.erase(lines_[victim].number);
    unlink(set, victim);
    free_.push_back(victim);
  }
  if (free_.empty()) {
    free_.push_back(static_cast<uint32_t>(lines_.size()));
    lines_.emplace_back();
  }
  const uint32_t index = free_.back();
  free_.pop_back();
  lines_[index] = Line{};
  lines_[index].number = number;
  index_of_[number] = index;
  link_newest(set, index);
  return lines_[index];
}

void L2Model::unlink(Set& set, uint32_t index) {
  const Line& line = lines_[index];
  (line.newer == kNone ? set.newest : lines_[line.newer].older) = line.older;
  (line.older == kNone ? set.oldest : lines_[line.older].newer) = line.newer;
  --set.lines;
}

void L2Model::link_newest(Set& set, uint32_t index) {
  lines_[index].newer = kNone;
  lines_[index].older = set.newest;
  (set.newest == kNone ? set.oldest : lines_[set.newest].newer) = index;
  set.newest = index;
  ++set.lines;
}

}  // namespace emulator
