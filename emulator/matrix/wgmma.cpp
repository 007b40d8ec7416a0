// Issue, execution and completion of wgmma groups; see wgmma.h.
#include "emulator/matrix/wgmma.h"

#include <algorithm>
#include <memory>

#include "emulator/machine/scheduler.h"
#include "emulator/matrix/wgmma_state.h"
#include "emulator/race/race.h"
#include "emulator/threads/warp.h"

namespace emulator {
namespace {

constexpr const char* kMma = "wgmma.mma_async";

// ---- issue --------------------------------------------------------------------------------------

// The operands of one lane of a wgmma.
struct Issue {
  WgmmaShape shape;
  float* d;
  const uint32_t* a_registers;  // null: a is a descriptor
  uint64_t a, b;
  bool accumulate;
};

// The four warps must exist, and a wgmma is one instruction for all of their lanes.
void check_issue(const LaneOperands<Issue>& lanes) {
  const Warp& warp = lanes.warp;
  const uint32_t last_warp = warp.warpgroup() * kWarpgroupWarps + kWarpgroupWarps - 1;
  if (last_warp >= warp.block->warps.size()) {
    fail(ErrorKind::Misuse, "%s: warpgroup %u has fewer than four warps", kMma, warp.warpgroup());
  }
  const Issue& first = lanes[0];
  if (first.shape.n < 8 || first.shape.n > kMaxN || first.shape.n % 8 != 0) {
    fail(ErrorKind::Misuse, "%s: N is %d; expected a multiple of 8 in 8..256", kMma, first.shape.n);
  }
  lanes.for_each([&](uint32_t lane, const Issue& issue) {
    if (issue.a != first.a || issue.b != first.b || issue.accumulate != first.accumulate) {
      fail(ErrorKind::Misuse, "%s: descriptors or scale-d of lanes 0 and %u differ", kMma, lane);
    }
  });
  const auto check_descriptor = [&](const char* name, uint64_t bits, Major major, int rows) {
    const std::string fault =
        descriptor_fault(decode_descriptor(bits), major, static_cast<uint32_t>(rows));
    if (!fault.empty()) {
      fail(ErrorKind::Misuse, "%s: the descriptor of %s, 0x%llx, %s", kMma, name,
           static_cast<unsigned long long>(bits), fault.c_str());
    }
  };
  if (first.a_registers == nullptr) check_descriptor("a", first.a, first.shape.major_a, 64);
  check_descriptor("b", first.b, first.shape.major_b, first.shape.n);
}

// Accumulators that were written after the fence are not ordered before the wgmma.
void check_unchanged_since_fence(const WarpWgmma& state, const WgmmaRegisters& registers) {
  for (const auto& finished : state.finished) {
    if (finished.registers == registers && finished.hash != registers.hash()) {
      fail(ErrorKind::Misuse,
           "%s: accumulator registers were written after wgmma_fence; move the fence behind it",
           kMma);
    }
  }
}

WgmmaAccumulator& accumulator_of(WarpWgmma& state, const WgmmaRegisters& registers,
                                 bool accumulate) {
  for (const auto& accumulator : state.in_flight) {
    if (accumulator->registers == registers) return *accumulator;
    if (accumulator->registers.overlaps(registers)) {
      fail(ErrorKind::Misuse,
           "%s: the accumulators overlap those of an m64n%dk16 in flight; wait for it first", kMma,
           accumulator->registers.n);
    }
  }
  if (accumulate) check_unchanged_since_fence(state, registers);
  std::erase_if(state.finished, [&](const WarpWgmma::Finished& finished) {
    return finished.registers.overlaps(registers);
  });
  state.in_flight.push_back(std::make_unique<WgmmaAccumulator>());
  WgmmaAccumulator& accumulator = *state.in_flight.back();
  accumulator.registers = registers;
  accumulator.take_from_registers();
  return accumulator;
}

// wgmmas of one shape on the same accumulators follow each other without a fence (PTX ISA,
// wgmma.fence).
bool is_in_flight(const WarpWgmma& state, const WgmmaRegisters& registers) {
  return std::any_of(state.in_flight.begin(), state.in_flight.end(),
                     [&](const auto& accumulator) { return accumulator->registers == registers; });
}

// An earlier wgmma in flight still reads the fragment that was in these registers.
void check_fragments(const WarpWgmma& state, const WgmmaOperation& next) {
  for (const WgmmaLoadedRegisters& loaded : state.loaded) {
    if (!loaded.overlaps(next)) continue;
    fail(ErrorKind::Misuse, "%s: registers of a were loaded after wgmma_fence; move the fence",
         kMma);
  }
  const auto check = [&](const WgmmaOperation& earlier) {
    if (!earlier.a_in_registers) return;
    for (uint32_t lane = 0; lane < kWarpSize; ++lane) {
      if (earlier.a_registers[lane] == next.a_registers[lane] &&
          earlier.a_fragments[lane] != next.a_fragments[lane]) {
        fail(ErrorKind::Misuse,
             "%s: registers of a were rewritten while a wgmma in flight reads them (lane %u); wait "
             "first, or use other registers",
             kMma, lane);
      }
    }
  };
  for (const WgmmaOperation& earlier : state.open) check(earlier);
  for (const auto& group : state.groups) {
    for (const WgmmaOperation& earlier : group->operations) check(earlier);
  }
}

void issue(Issue operand) {
  const uint32_t mask = aligned_mask(kMma);
  race_release(&wgmma_state(*current_thread().warp).issue_object);
  warp_collective<Issue>(mask, kMma, 0, operand, [](const LaneOperands<Issue>& lanes) {
    check_issue(lanes);
    const Issue& first = lanes[0];
    WarpWgmma& state = wgmma_state(lanes.warp);

    WgmmaRegisters registers;
    registers.n = first.shape.n;
    WgmmaOperation operation{first.shape,
                             first.a_registers != nullptr,
                             first.a,
                             first.b,
                             first.accumulate,
                             nullptr,
                             {},
                             {},
                             {}};
    lanes.for_each([&](uint32_t lane, const Issue& issue) {
      registers.lanes[lane] = issue.d;
      if (issue.a_registers == nullptr) return;
      operation.a_registers[lane] = issue.a_registers;
      std::copy_n(issue.a_registers, 4, operation.a_fragments[lane].begin());
    });
    if (!state.fenced && (operation.a_in_registers || !is_in_flight(state, registers))) {
      fail(ErrorKind::Misuse, "%s: expected wgmma_fence since the last commit or wait", kMma);
    }
    if (operation.a_in_registers) check_fragments(state, operation);
    operation.accumulator = &accumulator_of(state, registers, first.accumulate);
    operation.accumulator->last_group = state.committed;
    operation.agent = race_fork_async();
    race_async_acquire(operation.agent, &state.issue_object);
    state.open.push_back(std::move(operation));
  });
}

// ---- execution ----------------------------------------------------------------------------------

void finish_share(WgmmaGroup& group) {
  group.share_executed = true;
  WgmmaCompletion& completion = *group.completion;
  for (const WgmmaOperation& operation : group.operations) {
    race_async_complete(operation.agent, &completion.sync_object);
  }
  ++completion.shares_executed;
  if (!completion.complete()) return;
  note_progress();
  wake_all(completion);
}

void queue_next(Warp& warp);

// Executes the warp's part of its oldest wgmma.
void execute_next(Warp& warp) {
  WarpWgmma& state = wgmma_state(warp);
  state.executing = false;
  for (const auto& group : state.groups) {
    if (group->share_executed) continue;
    group->operations[group->executed++].execute(warp);
    if (group->executed == group->operations.size()) finish_share(*group);
    break;
  }
  queue_next(warp);
}

void queue_next(Warp& warp) {
  WarpWgmma& state = wgmma_state(warp);
  if (state.executing) return;
  for (const auto& group : state.groups) {
    if (group->share_executed) continue;
    if (!group->completion->started()) return;
    if (group->operations.empty()) {
      finish_share(*group);
      continue;
    }
    state.executing = true;
    engine_push({.what = kMma, .touches = warp.block, .perform = [&warp] { execute_next(warp); }});
    return;
  }
}

// A warpgroup's wgmmas are one sequence of instructions.
void check_same_instructions(const WgmmaGroup& expected, const Warp& expected_warp,
                             const WgmmaGroup& came, const Warp& came_warp) {
  if (expected.operations.size() != came.operations.size()) {
    fail(ErrorKind::Misuse, "wgmma.commit_group: warps %u and %u committed %zu and %zu wgmmas",
         expected_warp.index, came_warp.index, expected.operations.size(), came.operations.size());
  }
  for (size_t i = 0; i < came.operations.size(); ++i) {
    if (came.operations[i].same_instruction(expected.operations[i])) continue;
    fail(ErrorKind::Misuse, "%s: the warps of a warpgroup differ: warp %u issued %s; warp %u %s",
         kMma, expected_warp.index, expected.operations[i].describe().c_str(), came_warp.index,
         came.operations[i].describe().c_str());
  }
}

// Joins the group with those of the same index in the other warps; it may start once all four have
// committed it.
void commit(Warp& warp) {
  WarpWgmma& state = wgmma_state(warp);
  auto group = std::make_unique<WgmmaGroup>();
  group->index = state.committed++;
  group->operations = std::move(state.open);
  state.open.clear();
  state.fenced = false;

  const uint32_t first_warp = warp.warpgroup() * kWarpgroupWarps;
  const auto warps = static_cast<uint32_t>(warp.block->warps.size());
  const uint32_t end_warp = std::min(first_warp + kWarpgroupWarps, warps);
  for (uint32_t i = first_warp; i < end_warp && !group->completion; ++i) {
    Warp& other = *warp.block->warps[i];
    for (const auto& earlier : wgmma_state(other).groups) {
      if (&other == &warp || earlier->index != group->index) continue;
      check_same_instructions(*earlier, other, *group, warp);
      group->completion = earlier->completion;
    }
  }
  if (!group->completion) {
    group->completion = std::make_shared<WgmmaCompletion>();
    group->completion->warpgroup = warp.warpgroup();
    group->completion->index = group->index;
  }
  ++group->completion->warps_committed;
  state.groups.push_back(std::move(group));
  for (uint32_t i = first_warp; i < end_warp; ++i) queue_next(*warp.block->warps[i]);
}

// ---- waiting ------------------------------------------------------------------------------------

// Retires the groups before `end`, once all lanes have passed the wait.
void retire(WarpWgmma& state, uint64_t end) {
  while (!state.groups.empty() && state.groups.front()->index < end) state.groups.pop_front();
  std::erase_if(state.in_flight, [&](const std::unique_ptr<WgmmaAccumulator>& accumulator) {
    if (accumulator->last_group >= end) return false;
    state.finished.push_back({accumulator->registers, 0});
    return true;
  });
}

}  // namespace

void wgmma_fence() {
  constexpr const char* kWhat = "wgmma.fence";
  char nothing = 0;
  warp_collective<char>(aligned_mask(kWhat), kWhat, 0, nothing,
                        [](const LaneOperands<char>& lanes) {
                          WarpWgmma& state = wgmma_state(lanes.warp);
                          state.fenced = true;
                          state.loaded.clear();
                          for (auto& finished : state.finished) {
                            finished.hash = finished.registers.hash();
                          }
                        });
}

void wgmma_registers_loaded(Warp& warp, const WgmmaLoadedRegisters& registers) {
  if (!warp.wgmma) return;
  WarpWgmma& state = wgmma_state(warp);
  const auto check = [&](const WgmmaOperation& operation) {
    if (!registers.overlaps(operation)) return;
    fail(ErrorKind::Misuse,
         "registers of a are loaded while a wgmma in flight reads them; wait first, or use other "
         "registers");
  };
  for (const WgmmaOperation& operation : state.open) check(operation);
  for (const auto& group : state.groups) {
    for (const WgmmaOperation& operation : group->operations) check(operation);
  }
  state.loaded.push_back(registers);
}

void wgmma_ss(const WgmmaShape& shape, float* d, uint64_t a, uint64_t b, bool accumulate) {
  issue({shape, d, nullptr, a, b, accumulate});
}

void wgmma_rs(const WgmmaShape& shape, float* d, const uint32_t (&a)[4], uint64_t b,
              bool accumulate) {
  issue({shape, d, a, 0, b, accumulate});
}

void wgmma_commit_group() {
  constexpr const char* kWhat = "wgmma.commit_group";
  char nothing = 0;
  warp_collective<char>(aligned_mask(kWhat), kWhat, 0, nothing,
                        [](const LaneOperands<char>& lanes) { commit(lanes.warp); });
  preemption_point();
}

void wgmma_wait_group(uint32_t groups_left) {
  constexpr const char* kWhat = "wgmma.wait_group";
  char nothing = 0;
  WarpWgmma& state = wgmma_state(*current_thread().warp);
  warp_collective<char>(aligned_mask(kWhat), kWhat, groups_left, nothing,
                        [&](const LaneOperands<char>&) -> Waitable* {
                          state.fenced = false;
                          state.lanes_waited = 0;
                          for (auto group = state.groups.rbegin(); group != state.groups.rend();
                               ++group) {
                            if ((*group)->index + groups_left >= state.committed) continue;
                            WgmmaCompletion& completion = *(*group)->completion;
                            return completion.complete() ? nullptr : &completion;
                          }
                          return nullptr;
                        });
  const uint64_t end = state.committed > groups_left ? state.committed - groups_left : 0;
  for (const auto& group : state.groups) {
    if (group->index < end) race_acquire(&group->completion->sync_object);
  }
  const uint32_t lane = current_thread().lane;
  for (const auto& accumulator : state.in_flight) {
    if (accumulator->last_group < end) accumulator->give_to_registers(lane);
  }
  state.waited_for[lane] = std::max(state.waited_for[lane], end);
  if (++state.lanes_waited == kWarpSize) retire(state, end);
}

}  // namespace emulator
