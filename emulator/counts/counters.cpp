// Counting, and the bank model of shared memory; see counters.h.
#include "emulator/counts/counters.h"

#include <algorithm>
#include <array>
#include <utility>
#include <vector>

namespace emulator {
namespace {

constexpr uint32_t kBanks = 32;
constexpr uint32_t kBankBytes = 4;

Counters& state() {
  static Counters instance;
  return instance;
}

// Passes over the banks that distinct 4-byte words take: the largest number in one bank.
uint64_t passes(std::vector<uint32_t> words) {
  std::sort(words.begin(), words.end());
  words.erase(std::unique(words.begin(), words.end()), words.end());
  std::array<uint32_t, kBanks> in_bank{};
  for (uint32_t word : words) ++in_bank[word % kBanks];
  return *std::max_element(in_bank.begin(), in_bank.end());
}

}  // namespace

void count_matrix_phase(const uint32_t (&addresses)[8]) {
  std::vector<uint32_t> words;
  for (uint32_t address : addresses)
    for (uint32_t i = 0; i < 4; ++i) words.push_back(address / kBankBytes + i);
  ++state().matrix_phases;
  state().matrix_conflicts += passes(std::move(words)) - 1;
}

void count_global(GlobalAccess kind, size_t bytes) {
  state().global_bytes[static_cast<int>(kind)] += bytes;
}

void count_mma(uint64_t flop) { state().mma_flop += flop; }
void count_wgmma(uint64_t flop) { state().wgmma_flop += flop; }
void count_early_block() { ++state().early_blocks; }

Counters counters() { return state(); }
void reset_counters() { state() = {}; }

}  // namespace emulator
