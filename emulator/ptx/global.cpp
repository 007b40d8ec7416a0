#include "emulator/ptx/global.h"

#include "emulator/machine/fail.h"
#include "emulator/memory/global_memory.h"

namespace emulator::ptx {
namespace {

constexpr uint32_t kNever = ~0u;
constexpr size_t kMostGrids = 64;  // of a sequence: the bits of a mask

// What a warp knows, its own cluster's times among those of others.
Known published(const Warp& warp, const Known& known, const Clock& own) {
  Known all = known;
  auto clusters = known.clusters == nullptr ? Far() : *known.clusters;
  join(clusters[warp.block->cluster->number], own);
  all.clusters = std::make_shared<const Far>(std::move(clusters));
  return all;
}

void learn(Warp& warp, const Known& seen, const Known& proxied) {
  warp.knows.global.learn(seen), warp.knows.global_proxy.learn(proxied);
  if (seen.clusters == nullptr) return;
  const auto own = seen.clusters->find(warp.block->cluster->number);
  if (own != seen.clusters->end()) join(warp.knows.ordinary, own->second);
}

}  // namespace

void Known::learn(const Known& other) {
  grids |= other.grids;
  if (other.clusters == nullptr || other.clusters == clusters) return;
  if (clusters == nullptr) {
    clusters = other.clusters;
    return;
  }
  Far all = *clusters;
  for (const auto& [number, times] : *other.clusters) join(all[number], times);
  clusters = std::make_shared<const Far>(std::move(all));
}

GlobalMemory& global_memory() {
  static GlobalMemory one;
  return one;
}

// ---- grids --------------------------------------------------------------------------------------

void GlobalMemory::forget() {
  ++era_, clusters_ = 0;
  flags_.clear(), flags_proxy_.clear(), grids_.clear();
}

void GlobalMemory::begin_grid(bool programmatic) {
  if (grids_.size() == kMostGrids) forget();
  Sequenced made;
  if (!programmatic) flags_.clear(), flags_proxy_.clear();
  if (!grids_.empty()) {
    const Sequenced& before = grids_.back();
    if (!programmatic)
      made.started = made.started_proxy = before.ended;
    else if (before.follow_start)
      made.started = before.started, made.started_proxy = before.started_proxy;
    if (programmatic && before.follow_before && grids_.size() > 1)
      made.started |= grids_[grids_.size() - 2].ended;
  }
  made.ended = uint64_t{1} << grids_.size();
  grids_.push_back(made);
}

void GlobalMemory::written_before(const void* buffer) {
  const GlobalRange* range = find_global(buffer);
  if (range == nullptr) return;
  if (grids_.empty()) begin_grid(false), next_cluster();
  Who neighbour;
  neighbour.cluster = clusters_, neighbour.time = kNever, neighbour.halves = 3;
  const auto begin = reinterpret_cast<uint64_t>(range->begin);
  for (uint64_t at = begin; at < begin + range->bytes; at += kCell) cell(at).writer = neighbour;
}

void GlobalMemory::end_of_sequence() {
  begin_grid(false);
  const uint64_t earlier = grids_.back().ended - 1, missing = earlier & ~grids_.back().started;
  if (missing != 0)
    throw Error(ErrorKind::Race,
                format("grid %d of %zu may run when what is launched behind the last one starts: "
                       "some grid after it does not wait for it",
                       __builtin_ctzll(missing) + 1, grids_.size() - 1));
}

void GlobalMemory::start(Warp& warp) {
  warp.knows.global.grids = grids_.back().started;
  warp.knows.global_proxy.grids = grids_.back().started_proxy;
}

void GlobalMemory::leave(Warp& warp) { grids_.back().ended |= warp.knows.global.grids; }

void GlobalMemory::signal(Block& block, bool start, bool before) {
  if (block.launched_dependents) return;
  block.launched_dependents = true;
  grids_.back().follow_start |= start, grids_.back().follow_before |= before;
}
void GlobalMemory::block_exits(Block& block) { signal(block, true, block.waited_for_grids); }
void GlobalMemory::launch_dependents(Warp& warp) {
  signal(*warp.block, warp.fenced, warp.fenced_behind_wait);
}
void GlobalMemory::wait_for_grids(Warp& warp) {
  if (grids_.size() < 2) return;
  warp.knows.global.grids |= grids_[grids_.size() - 2].ended;
  warp.block->waited_for_grids = true;
}

// ---- flags and fences ---------------------------------------------------------------------------

void GlobalMemory::fence(Warp& warp) {
  learn(warp, warp.pending, warp.pending_proxy);
  warp.fenced = true, warp.fenced_behind_wait = warp.block->waited_for_grids;
  warp.published = published(warp, warp.knows.global, warp.knows.ordinary);
  warp.published_proxy = warp.knows.global_proxy;
  warp.tick();
}

void GlobalMemory::proxy_fence(Warp& warp) {
  warp.knows.global_proxy.learn(published(warp, warp.knows.global, warp.knows.ordinary));
  warp.tick();
}

void GlobalMemory::release(Warp& warp, const void* flag, bool at_once) {
  if (at_once) {
    flags_[flag].learn(published(warp, warp.knows.global, warp.knows.ordinary));
    flags_proxy_[flag].learn(warp.knows.global_proxy);
    warp.tick();
  } else {
    flags_[flag].learn(warp.published), flags_proxy_[flag].learn(warp.published_proxy);
  }
}

void GlobalMemory::acquire(Warp& warp, const void* flag, bool at_once) {
  const auto found = flags_.find(flag);
  if (found == flags_.end()) return;
  if (at_once) {
    learn(warp, found->second, flags_proxy_[flag]);
  } else {
    warp.pending.learn(found->second), warp.pending_proxy.learn(flags_proxy_[flag]);
  }
}

// ---- accesses -----------------------------------------------------------------------------------

GlobalMemory::Page& GlobalMemory::page(uint64_t number) {
  if (number != last_number_) {
    std::unique_ptr<Page>& found = pages_[number];
    if (found == nullptr) found = std::make_unique<Page>();
    last_ = found.get(), last_number_ = number;
  }
  if (last_->era != era_) *last_ = {}, last_->era = era_;
  return *last_;
}

bool GlobalMemory::known(const Warp& warp, uint32_t lane, const Who& who,
                         bool through_proxy) const {
  const Known& knows = through_proxy ? warp.knows.global_proxy : warp.knows.global;
  if (who.grid != grids_.size() - 1 && (knows.grids >> who.grid & 1)) return true;
  const uint32_t own = warp.block->cluster->number;
  if (who.cluster == own && !through_proxy) {
    if (who.agent != warp.agent) return who.time <= warp.knows.ordinary[who.agent];
    return who.time != kNever && (who.lane == lane || who.time < warp.synchronised);
  }
  if (knows.clusters == nullptr) return false;
  const auto found = knows.clusters->find(who.cluster);
  return found != knows.clusters->end() && who.agent < found->second.size() &&
         who.time <= found->second[who.agent];
}

std::string GlobalMemory::unordered(const char* what, const char* before, const void* pointer,
                                    const Who& who) const {
  const GlobalRange* range = find_global(pointer);
  const auto at = static_cast<const unsigned char*>(pointer);
  return format(
      "%s of byte %td of %s after an unordered %s by warp %u of cluster %u, grid %u of %zu", what,
      range == nullptr ? 0 : at - range->begin,
      range == nullptr ? "global memory" : range->name.c_str(), before, who.agent, who.cluster,
      who.grid + 1u, grids_.size());
}

GlobalMemory::Who GlobalMemory::who(const Warp& warp, uint32_t lane, Access access) const {
  Who made;
  made.cluster = warp.block->cluster->number, made.time = warp.now();
  made.agent = static_cast<uint16_t>(warp.agent), made.lane = static_cast<uint8_t>(lane);
  made.grid = static_cast<uint8_t>(grids_.size() - 1) & 63, made.access = access;
  return made;
}

namespace {
// Visits (page, cell of it, which of its two bytes).
template <class Visit>
void for_cells(const void* pointer, uint32_t bytes, const Visit& visit) {
  const auto begin = reinterpret_cast<uint64_t>(pointer), end = begin + bytes;
  for (uint64_t at = begin; at < end;) {
    const uint64_t next = std::min(end, (at | 1) + 1);
    visit(at, static_cast<uint8_t>(next - at == 2 ? 3 : 1 << (at & 1)));
    at = next;
  }
}
}  // namespace

std::string GlobalMemory::read(const Warp& warp, uint32_t lane, const void* pointer, uint32_t bytes,
                               Access access) {
  if (!warp.block->cluster->grid->race) return "";
  std::string wrong;
  Who me = who(warp, lane, access);
  for_cells(pointer, bytes, [&](uint64_t at, uint8_t halves) {
    Cell& cell = this->cell(at);
    const Who& last = cell.writer;
    if (last.cluster != 0 && (last.halves & halves) && !(last.access & access & kAtomic) &&
        !known(warp, lane, last, access == kAsync && last.access != kAsync) && wrong.empty())
      wrong = unordered("read", "write", reinterpret_cast<const void*>(at), last);
    me.halves = halves;
    Who &newest = cell.readers[0], &older = cell.readers[1];
    if (newest.cluster != me.cluster || newest.agent != me.agent) older = newest;
    newest = me;
  });
  return wrong;
}

std::string GlobalMemory::write(const Warp& warp, uint32_t lane, const void* pointer,
                                uint32_t bytes, Access access, bool complete) {
  if (!warp.block->cluster->grid->race) return "";
  std::string wrong;
  Who me = who(warp, lane, access);
  if (!complete) me.time = kNever;
  for_cells(pointer, bytes, [&](uint64_t at, uint8_t halves) {
    Cell& cell = this->cell(at);
    const auto check = [&](const Who& last, const char* before) {
      const bool own = last.cluster == me.cluster && last.agent == me.agent;
      if (last.cluster == 0 || own || !(last.halves & halves) || (last.access & access & kAtomic))
        return;
      const bool proxy = access == kAsync && last.access != kAsync && &last == &cell.writer;
      if (!known(warp, lane, last, proxy) && wrong.empty())
        wrong = unordered("write", before, reinterpret_cast<const void*>(at), last);
    };
    check(cell.writer, "write");
    for (const Who& reader : cell.readers) check(reader, "read");
    me.halves = halves;
    cell.writer = me;
    if (!(access & kAtomic)) cell.readers[0] = cell.readers[1] = {};
  });
  return wrong;
}

}  // namespace emulator::ptx
