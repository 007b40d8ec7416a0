// Groups the waiting threads by what they wait for.
#include "emulator/machine/deadlock.h"

#include <map>
#include <tuple>
#include <vector>

#include "emulator/machine/machine.h"

namespace emulator {
namespace {

struct ByIndex {
  bool operator()(const Block* a, const Block* b) const {
    return std::tie(a->index.z, a->index.y, a->index.x) <
           std::tie(b->index.z, b->index.y, b->index.x);
  }
};

struct Waiting {
  uint32_t threads = 0;
  std::map<const Block*, std::map<uint32_t, uint32_t>, ByIndex> lanes;  // block -> warp -> mask
};

// "block (0,0,0) warps 0-3, 5 lane mask 00000001"
std::string describe(const Block& block, const std::map<uint32_t, uint32_t>& lanes) {
  std::string text = format("block (%u,%u,%u)", block.index.x, block.index.y, block.index.z);
  for (auto it = lanes.begin(); it != lanes.end();) {
    const auto [first, mask] = *it;
    uint32_t last = first;
    for (++it; it != lanes.end() && it->first == last + 1 && it->second == mask; ++it) ++last;
    text += first == last ? format(" warp %u", first) : format(" warps %u-%u", first, last);
    if (mask != block.warps[first]->lanes) text += format(" lanes %08x", mask);
  }
  return text;
}

}  // namespace

std::string describe_waiting_threads() {
  const Machine& m = machine();
  std::map<std::string, Waiting> by_description;
  std::vector<std::string> order;
  std::string text, half_full;
  for (const auto& cluster : m.resident) {
    for (const auto& block : cluster->blocks) {
      for (uint32_t i = 0; i < block->thread_count; ++i) {
        const Thread& thread = block->threads[i];
        if (thread.exited || thread.waiting_on == nullptr) continue;
        const std::string description =
            (thread.polling ? "poll " : "wait at ") + thread.waiting_on->describe();
        Waiting& waiting = by_description[description];
        if (waiting.threads++ == 0) order.push_back(description);
        waiting.lanes[block.get()][thread.warp->index] |= 1u << thread.lane;
      }
      for (const NamedBarrier& barrier : block->barriers) {
        if (barrier.arrived != 0 && barrier.waiters == nullptr) {
          half_full += format("\n    block (%u,%u,%u): nobody waits at ", block->index.x,
                              block->index.y, block->index.z) +
                       barrier.describe();
        }
      }
      if (block->live_threads < block->thread_count) {
        half_full += format("\n    block (%u,%u,%u): %u of %u threads have exited", block->index.x,
                            block->index.y, block->index.z,
                            block->thread_count - block->live_threads, block->thread_count);
      }
    }
  }
  constexpr size_t kMaxLines = 24;
  for (size_t i = 0; i < order.size() && i < kMaxLines; ++i) {
    const Waiting& waiting = by_description[order[i]];
    text += "\n    ";
    for (const auto& [block, lanes] : waiting.lanes) text += describe(*block, lanes) + ", ";
    text += format("%u threads ", waiting.threads) + order[i];
  }
  if (order.size() > kMaxLines) text += format("\n    and %zu more", order.size() - kMaxLines);
  text += half_full;
  size_t not_started = 0;
  for (const auto& grid : m.grids) not_started += grid->clusters_to_start.size();
  if (not_started != 0) {
    text += format("\n    %zu clusters have not started: %zu are resident, at most %u may be",
                   not_started, m.resident.size(), m.config.resident_clusters);
  }
  return text;
}

void report_deadlock() {
  fail(ErrorKind::Deadlock, "no thread can go on, and no asynchronous operation is in flight%s",
       describe_waiting_threads().c_str());
}

}  // namespace emulator
