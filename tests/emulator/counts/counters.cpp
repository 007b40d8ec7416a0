// Counting, and the bank model of shared memory; see counters.h.
#include "emulator/counts/counters.h"

#include <algorithm>
#include <array>
#include <map>
#include <optional>
#include <utility>
#include <vector>

#include "emulator/machine/fail.h"

namespace emulator {
namespace {

constexpr uint32_t kBanks = 32;
constexpr uint32_t kBankBytes = 4;
constexpr uint32_t kLanes = 32;

constexpr const char* kGlobalNames[kGlobalAccesses] = {"cp_async", "tma_load", "tma_store",
                                                       "load",     "store",    "atomic"};
constexpr const char* kBarrierNames[kBarrierKinds] = {"named", "cluster", "warp", "mbarrier_arrive",
                                                      "mbarrier_wait"};

// A warp's request under construction.
struct Request {
  uint32_t lanes = 0;  // as a mask
  std::array<uint32_t, kLanes> addresses;
};

struct Instruction {
  uint32_t bytes = 0;
  std::array<uint32_t, kLanes> executions{};
  uint32_t first = 0;  // which execution requests[0] is
  std::vector<Request> requests;
};

struct State {
  Counters counters;
  std::optional<L2Model> l2;
  std::map<std::pair<const void*, const void*>, Instruction> open;  // by warp and instruction
};

State& state() {
  static State instance;
  return instance;
}

// Passes over the banks that distinct 4-byte words take: the most that fall to one bank.
uint64_t passes(std::vector<uint32_t> words) {
  std::sort(words.begin(), words.end());
  words.erase(std::unique(words.begin(), words.end()), words.end());
  std::array<uint32_t, kBanks> in_bank{};
  for (uint32_t word : words) ++in_bank[word % kBanks];
  return *std::max_element(in_bank.begin(), in_bank.end());
}

// The hardware serves 32 lanes of 4 bytes, 16 of 8 or 8 of 16 at a time.
void finish(const Request& request, uint32_t bytes, Counters& counts) {
  const uint32_t words_each = std::max(1u, bytes / kBankBytes);
  const uint32_t lanes_at_a_time = kLanes / words_each;
  for (uint32_t first = 0; first < kLanes; first += lanes_at_a_time) {
    std::vector<uint32_t> words;
    for (uint32_t lane = first; lane < first + lanes_at_a_time; ++lane)
      if (request.lanes >> lane & 1)
        for (uint32_t i = 0; i < words_each; ++i)
          words.push_back(request.addresses[lane] / kBankBytes + i);
    if (words.empty()) continue;
    ++counts.shared_requests;
    counts.shared_conflicts += passes(std::move(words)) - 1;
  }
}

}  // namespace

void count_matrix_phase(const uint32_t (&addresses)[8]) {
  std::vector<uint32_t> words;
  for (uint32_t address : addresses)
    for (uint32_t i = 0; i < 4; ++i) words.push_back(address / kBankBytes + i);
  ++state().counters.matrix_phases;
  state().counters.matrix_conflicts += passes(std::move(words)) - 1;
}

void count_global(GlobalAccess kind, const void* pointer, size_t bytes) {
  State& s = state();
  s.counters.global_bytes[static_cast<int>(kind)] += bytes;
  if (!s.l2) return;
  const auto address = reinterpret_cast<uintptr_t>(pointer);
  const bool reads = kind != GlobalAccess::Store && kind != GlobalAccess::TmaStore;
  const bool writes = !reads || kind == GlobalAccess::Atomic;
  if (reads) s.l2->read(address, bytes);
  if (writes) s.l2->write(address, bytes);
}

void count_mma(uint64_t flop) { state().counters.mma_flop += flop; }
void count_wgmma(uint64_t flop) { state().counters.wgmma_flop += flop; }
void count_early_block() { ++state().counters.early_blocks; }
void count_barrier(BarrierKind kind) { ++state().counters.barriers[static_cast<int>(kind)]; }

void count_shared(const void* warp, uint32_t lane, const void* instruction, uint32_t address,
                  uint32_t bytes) {
  State& s = state();
  Instruction& at = s.open[{warp, instruction}];
  at.bytes = bytes;
  const uint32_t index = at.executions[lane]++;
  if (index < at.first) {  // its request has been closed: it cannot be joined any more
    Request alone;
    alone.lanes = 1u << lane;
    alone.addresses[lane] = address;
    return finish(alone, bytes, s.counters);
  }
  const uint32_t slot = index - at.first;
  if (slot >= at.requests.size()) at.requests.resize(slot + 1);
  Request& request = at.requests[slot];
  request.lanes |= 1u << lane;
  request.addresses[lane] = address;
  while (!at.requests.empty() && at.requests.front().lanes == ~0u) {
    finish(at.requests.front(), bytes, s.counters);
    at.requests.erase(at.requests.begin());
    ++at.first;
  }
}

Counters counters() {
  const State& s = state();
  Counters result = s.counters;
  for (const auto& [key, instruction] : s.open)
    for (const Request& request : instruction.requests) finish(request, instruction.bytes, result);
  if (s.l2) {
    L2Model drained = *s.l2;
    drained.flush();
    result.l2 = drained.traffic();
  }
  return result;
}

void reset_counters() {
  State& s = state();
  s.counters = {};
  s.open.clear();
}

void use_l2_model(const L2Config& config) { state().l2.emplace(config); }
void stop_l2_model() { state().l2.reset(); }

uint64_t Counters::total_global_bytes() const {
  uint64_t total = 0;
  for (uint64_t bytes : global_bytes) total += bytes;
  return total;
}

namespace {

using Entry = std::pair<std::string, uint64_t>;

std::vector<Entry> entries(const Counters& counters) {
  std::vector<Entry> list = {{"matrix_phases", counters.matrix_phases},
                             {"matrix_conflicts", counters.matrix_conflicts},
                             {"shared_requests", counters.shared_requests},
                             {"shared_conflicts", counters.shared_conflicts}};
  for (int i = 0; i < kGlobalAccesses; ++i)
    list.emplace_back(std::string("global_bytes_") + kGlobalNames[i], counters.global_bytes[i]);
  list.emplace_back("mma_flop", counters.mma_flop);
  list.emplace_back("wgmma_flop", counters.wgmma_flop);
  for (int i = 0; i < kBarrierKinds; ++i)
    list.emplace_back(std::string("barriers_") + kBarrierNames[i], counters.barriers[i]);
  list.emplace_back("early_blocks", counters.early_blocks);
  list.emplace_back("l2_read_sectors", counters.l2.read_sectors);
  list.emplace_back("l2_read_misses", counters.l2.read_misses);
  list.emplace_back("l2_write_sectors", counters.l2.write_sectors);
  list.emplace_back("dram_read_bytes", counters.l2.dram_read_bytes);
  list.emplace_back("dram_write_bytes", counters.l2.dram_write_bytes);
  return list;
}

}  // namespace

std::string Counters::table() const {
  std::string text;
  for (const auto& [name, value] : entries(*this))
    text += format("%-28s %14llu\n", name.c_str(), static_cast<unsigned long long>(value));
  return text;
}

std::string Counters::json() const {
  std::string text = "{";
  for (const auto& [name, value] : entries(*this))
    text += format("%s\"%s\": %llu", text.size() > 1 ? ", " : "", name.c_str(),
                   static_cast<unsigned long long>(value));
  return text + "}";
}

}  // namespace emulator
