// Immediate post-dominators of basic blocks (Cooper, Harvey, Kennedy, "A simple, fast dominance
// algorithm", on the reversed graph).
#include <algorithm>

#include "emulator/ptx/decoder.h"

namespace emulator::ptx {
namespace {

struct Graph {
  std::vector<uint32_t> begins;                     // the first operation of each block
  std::vector<std::vector<uint32_t>> next, before;  // the end is one more block
};

Graph graph_of(const std::vector<Operation>& operations) {
  const auto count = static_cast<uint32_t>(operations.size());
  std::vector<bool> leads(count + 1);
  leads[0] = true;
  for (uint32_t at = 0; at < count; ++at) {
    const Operation& each = operations[at];
    if (each.branches) leads[each.target] = true;
    if (each.branches || each.kind == kExit) leads[at + 1] = true;
  }
  Graph graph;
  std::vector<uint32_t> block_of(count + 1);
  for (uint32_t at = 0; at < count; ++at) {
    if (leads[at]) graph.begins.push_back(at);
    block_of[at] = static_cast<uint32_t>(graph.begins.size()) - 1;
  }
  const auto end = static_cast<uint32_t>(graph.begins.size());
  block_of[count] = end;
  graph.next.resize(end + 1), graph.before.resize(end + 1);
  for (uint32_t block = 0; block < end; ++block) {
    const uint32_t last = (block + 1 < end ? graph.begins[block + 1] : count) - 1;
    const Operation& operation = operations[last];
    std::vector<uint32_t>& next = graph.next[block];
    if (operation.branches) next.push_back(block_of[operation.target]);
    const bool leaves = operation.branches || operation.kind == kExit;
    if (!leaves || operation.guard != kNone) next.push_back(block_of[last + 1]);
    if (operation.kind == kExit) next.push_back(end);
    for (const uint32_t each : next) graph.before[each].push_back(block);
  }
  return graph;
}

}  // namespace

void find_reconvergence(std::vector<Operation>& operations) {
  const Graph graph = graph_of(operations);
  const auto end = static_cast<uint32_t>(graph.begins.size());
  // Blocks in postorder of the reversed graph, from the end.
  std::vector<uint32_t> order, rank(end + 1, kNone);
  std::vector<std::pair<uint32_t, size_t>> open{{end, 0}};
  std::vector<bool> seen(end + 1);
  seen[end] = true;
  while (!open.empty()) {
    auto& [block, child] = open.back();
    if (child == graph.before[block].size()) {
      rank[block] = static_cast<uint32_t>(order.size());
      order.push_back(block);
      open.pop_back();
      continue;
    }
    const uint32_t before = graph.before[block][child++];
    if (!seen[before]) seen[before] = true, open.emplace_back(before, 0);
  }
  std::vector<uint32_t> after(end + 1, kNone);
  after[end] = end;
  for (bool changed = true; changed;) {
    changed = false;
    for (auto block = order.rbegin(); block != order.rend(); ++block) {
      if (*block == end) continue;
      uint32_t found = kNone;
      for (uint32_t next : graph.next[*block]) {
        if (after[next] == kNone) continue;
        while (found != kNone && found != next) {
          while (found != next && rank[found] < rank[next]) found = after[found];
          while (found != next && rank[next] < rank[found]) next = after[next];
        }
        found = next;
      }
      if (found != after[*block]) after[*block] = found, changed = true;
    }
  }
  for (uint32_t block = 0; block < end; ++block) {
    const uint32_t last =
        (block + 1 < end ? graph.begins[block + 1] : static_cast<uint32_t>(operations.size())) - 1;
    const uint32_t meets = after[block];
    if (operations[last].branches)
      operations[last].reconverges = meets == kNone || meets == end ? kNone : graph.begins[meets];
  }
}

}  // namespace emulator::ptx
