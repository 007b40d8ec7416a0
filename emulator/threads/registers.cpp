// The register pool of a block. .inc takes what .dec has released, or waits for it.
#include "emulator/threads/registers.h"

#include <algorithm>
#include <cstdlib>

#include "emulator/threads/warp.h"

namespace emulator {
namespace {

constexpr uint32_t kGranule = 8;
constexpr uint32_t kMin = 24, kMax = 256;

// All warps of a warpgroup execute the same sequence of setmaxnreg (PTX ISA).
void record_request(Warp& warp, int32_t request) {
  const size_t position = warp.register_requests.size();
  warp.register_requests.push_back(request);
  for (const auto& other : warp.block->warps) {
    if (other->warpgroup() != warp.warpgroup() || other->register_requests.size() <= position) {
      continue;
    }
    const int32_t theirs = other->register_requests[position];
    if (theirs != request) {
      fail(ErrorKind::Misuse,
           "setmaxnreg.%s %d, but warp %u of the same warpgroup executed setmaxnreg.%s %d",
           request < 0 ? "dec" : "inc", std::abs(request), other->index, theirs < 0 ? "dec" : "inc",
           std::abs(theirs));
    }
  }
}

void check_count(uint32_t registers, const char* name) {
  if (registers % kGranule != 0 || registers < kMin || registers > kMax) {
    fail(ErrorKind::Misuse, "%s %u: the count must be a multiple of %u in %u..%u", name, registers,
         kGranule, kMin, kMax);
  }
}

}  // namespace

std::string RegisterPool::describe() const {
  std::string text =
      format("setmaxnreg.inc: %u registers are free in the block's pool; per thread,", free);
  for (const auto& warp : block->warps) {
    if (warp->index % kWarpgroupWarps == 0) {
      text += format(" warpgroup %u has %u", warp->warpgroup(), warp->registers);
    }
  }
  return text;
}

uint32_t default_registers(uint32_t threads, uint32_t registers_per_sm) {
  const uint32_t warps = (threads + kWarpSize - 1) / kWarpSize;
  return std::min(kMax, registers_per_sm / (warps * kWarpSize) / kGranule * kGranule);
}

void setmaxnreg_dec(uint32_t registers) {
  constexpr const char* kName = "setmaxnreg.dec";
  check_count(registers, kName);
  struct {
  } none;
  warp_collective(aligned_mask(kName), kName, registers, none, [&](const auto& lanes) {
    Warp& warp = lanes.warp;
    if (registers > warp.registers) {
      fail(ErrorKind::Misuse, "setmaxnreg.dec %u: the warp has only %u registers per thread",
           registers, warp.registers);
    }
    record_request(warp, -static_cast<int32_t>(registers));
    warp.block->registers.free += (warp.registers - registers) * kWarpSize;
    warp.registers = registers;
    wake_all(warp.block->registers);
  });
  preemption_point();
}

void setmaxnreg_inc(uint32_t registers) {
  constexpr const char* kName = "setmaxnreg.inc";
  check_count(registers, kName);
  struct Operand {
    bool taken;
  };
  bool first = true;
  for (bool taken = false; !taken;) {
    Operand operand{false};
    warp_collective(aligned_mask(kName), kName, registers, operand,
                    [&](const LaneOperands<Operand>& lanes) -> Waitable* {
                      Warp& warp = lanes.warp;
                      RegisterPool& pool = warp.block->registers;
                      if (first) {
                        if (registers < warp.registers) {
                          fail(ErrorKind::Misuse,
                               "setmaxnreg.inc %u: the warp already has %u registers per thread",
                               registers, warp.registers);
                        }
                        record_request(warp, static_cast<int32_t>(registers));
                      }
                      const uint32_t wanted = (registers - warp.registers) * kWarpSize;
                      if (wanted > pool.free) return &pool;
                      pool.free -= wanted;
                      warp.registers = registers;
                      lanes.for_each([](uint32_t, Operand& o) { o.taken = true; });
                      return nullptr;
                    });
    first = false;
    taken = operand.taken;
  }
}

void registers_block_exits(const Block& block) {
  for (const auto& warp : block.warps) {
    const Warp& leader = *block.warps[warp->warpgroup() * kWarpgroupWarps];
    if (warp->register_requests.size() != leader.register_requests.size()) {
      fail(ErrorKind::ExitCheck,
           "warp %u executed %zu setmaxnreg, warp %u of the same warpgroup %zu", warp->index,
           warp->register_requests.size(), leader.index, leader.register_requests.size());
    }
  }
}

}  // namespace emulator
