// The loop that runs everything: turns of warps, asynchronous operations, starts of blocks, polling
// threads; and how a thread waits, is woken and is suspended.
#include "emulator/machine/scheduler.h"

#include <algorithm>
#include <bit>
#include <cstdlib>
#include <utility>

#include "emulator/machine/deadlock.h"
#include "emulator/machine/memory_fault.h"
#include "emulator/machine/residency.h"
#include "emulator/machine/schedule_policy.h"
#include "emulator/machine/watchdog.h"

namespace emulator {
namespace {

// The odds that a block that waits to start does so: one turn in this number.
uint32_t g_start_odds = 1;

struct Polls {
  uint64_t progress_at_retry = 0;
  uint32_t vain_retries = 0;
};
Polls g_polls;

// ---- turns --------------------------------------------------------------------------------------

void run_turn(Warp& warp) {
  Machine& m = machine();
  g_policy.return_to_scheduler = g_policy.yielded = false;
  g_policy.switches_left = turn_length();
  ++m.turns;
  Thread& thread = take_ready_lane(warp);
  m.current = &thread;
  switch_context(m.scheduler, thread.context);
  m.current = nullptr;
  g_policy.last = warp.alive != 0 && !g_policy.yielded ? &warp : nullptr;
  if (m.failure) std::rethrow_exception(std::exchange(m.failure, nullptr));
}

// The current thread goes back to the scheduler, which may choose it again.
void give_way() {
  Thread& self = *machine().current;
  set_ready(*self.warp, 1u << self.lane);
  g_policy.return_to_scheduler = true;
  suspend();
}

// ---- asynchronous operations --------------------------------------------------------------------

bool wants_operation() {
  Machine& m = machine();
  if (m.operations.empty()) return false;
  constexpr uint32_t kTurnsPerOperation = 4;
  constexpr uint32_t kTurnsUntilLate = 1
                                       << 14;  // for threads that yield until it has been performed
  switch (m.config.completion) {
    case Completion::Early:
      return true;
    case Completion::Late:
      return m.rng.one_in(kTurnsUntilLate);
    case Completion::Random:
      return m.rng.one_in(kTurnsPerOperation);
  }
  return false;
}

void perform_operation(size_t index) {
  Machine& m = machine();
  const AsyncOperation operation = std::move(m.operations[index]);
  m.operations.erase(m.operations.begin() + static_cast<std::ptrdiff_t>(index));
  m.current_operation = &operation;
  operation.perform();
  m.current_operation = nullptr;
  if (operation.touches != nullptr) --operation.touches->operations_in_flight;
  if (--operation.issuer->block().cluster->operations_in_flight == 0) m.residency_changed = true;
  note_progress();
}

void perform_operation() {
  Machine& m = machine();
  const bool first = m.config.completion == Completion::Early;
  perform_operation(first ? 0 : m.rng.below(static_cast<uint32_t>(m.operations.size())));
}

// ---- polling threads ----------------------------------------------------------------------------

void remove_poller(Thread& thread) {
  auto& pollers = machine().pollers;
  const auto found = std::find(pollers.begin(), pollers.end(), &thread);
  *found = pollers.back();
  pollers.pop_back();
  thread.polling = false;
}

// Takes a thread from the list of the thing that it polls, and lets it look again.
void retry_poller(Thread& thread) {
  Thread** link = &thread.waiting_on->waiters;
  while (*link != &thread) link = &(*link)->next_waiter;
  *link = thread.next_waiter;
  make_ready(thread);
}

bool wake_changed_pollers() {
  auto& pollers = machine().pollers;
  bool any = false;
  for (size_t i = pollers.size(); i-- > 0;) {
    if (!pollers[i]->waiting_on->changed()) continue;
    retry_poller(*pollers[i]);
    any = true;
  }
  return any;
}

// No other thread can run. A loop that polls several things in sequence may be waiting for another
// than the one that it looked at last, so all pollers look again; they are stuck only if nothing
// changes after repeated attempts.
bool retry_all_pollers() {
  Machine& m = machine();
  if (m.pollers.empty()) return false;
  if (m.progress != g_polls.progress_at_retry) g_polls.vain_retries = 0;
  g_polls.progress_at_retry = m.progress;
  constexpr uint32_t kMaxVainRetries = 200;
  if (++g_polls.vain_retries > kMaxVainRetries) return false;
  while (!m.pollers.empty()) retry_poller(*m.pollers.back());
  return true;
}

// ---- the loop -----------------------------------------------------------------------------------

void start_a_block() {
  Machine& m = machine();
  const uint32_t chosen = m.rng.below(static_cast<uint32_t>(m.blocks_to_start.size()));
  Block& block = *m.blocks_to_start[chosen];
  m.blocks_to_start.erase(m.blocks_to_start.begin() + chosen);
  start_block(block);
  note_progress();
}

// No warp is ready: something else must happen.
void advance_without_threads() {
  Machine& m = machine();
  if (wake_changed_pollers()) return;
  const bool can_perform = !m.operations.empty(), can_start = !m.blocks_to_start.empty();
  if (can_perform && (!can_start || m.rng.one_in(2))) return perform_operation();
  if (can_start) return start_a_block();
  if (!retry_all_pollers()) report_deadlock();
}

void step() {
  Machine& m = machine();
  if (wants_operation()) return perform_operation();
  if (!m.blocks_to_start.empty() && m.rng.one_in(g_start_odds)) return start_a_block();
  constexpr uint32_t kTurnsPerPoll = 8;
  if (!m.pollers.empty() && m.rng.one_in(kTurnsPerPoll)) wake_changed_pollers();
  if (m.ready_warps.empty()) return advance_without_threads();
  update_freeze();
  Warp* warp = pick_warp();
  if (warp == nullptr) {
    // Both cases must occur: the frozen warps miss an operation, or do not.
    if (!m.operations.empty() && m.rng.one_in(2)) return perform_operation();
    thaw();
    warp = pick_warp();
  }
  run_turn(*warp);
}

}  // namespace

// ---- the interface ------------------------------------------------------------------------------

void run_machine() {
  Machine& m = machine();
  g_policy = {};
  g_polls = {};
  constexpr uint32_t kStartOdds[] = {1, 16, 256};  // together, a little apart, far apart
  g_start_odds = kStartOdds[m.rng.below(3)];
  const Watchdog watchdog(m.config.watchdog_seconds);
  const MemoryFaultHandler memory_fault_handler;
  m.residency_changed = true;
  for (;;) {
    if (m.residency_changed && !update_residency()) return;
    if (m.time_is_over) watchdog_report();
    step();
  }
}

void suspend() {
  Machine& m = machine();
  Thread& self = *m.current;
  Warp& warp = *self.warp;
  ++m.switches;
  // Between lanes of one warp the switch is direct; anything else is decided on the scheduler's
  // stack.
  if (warp.ready != 0 && g_policy.switches_left > 0 && !g_policy.return_to_scheduler &&
      !m.time_is_over) {
    --g_policy.switches_left;
    Thread& next = take_ready_lane(warp);
    if (&next == &self) return;
    m.current = &next;
    switch_context(self.context, next.context, self.exited);
  } else {
    switch_context(self.context, m.scheduler, self.exited);
  }
}

void abandon_current_thread(std::exception_ptr failure) {
  Machine& m = machine();
  m.failure = std::move(failure);
  switch_context(m.current->context, m.scheduler, /*last=*/true);
  std::abort();  // no fiber switches back
}

void yield() {
  Machine& m = machine();
  Warp& warp = *current_thread().warp;
  // A thread that yields in a loop waits for another one, so no policy may keep preferring it.
  warp.rotation = (m.current->lane + 1) % kWarpSize;
  warp.priority = --g_policy.lowest_priority;
  g_policy.yielded = true;
  give_way();
}

void preemption_point() {
  Machine& m = machine();
  if (m.current == nullptr || m.current_operation != nullptr) return;  // not on behalf of a thread
  constexpr uint32_t kPointsPerPreemption = 4;
  switch (m.config.schedule) {
    case Schedule::RunAhead:
      break;
    case Schedule::Random:
      if (m.rng.one_in(kPointsPerPreemption)) return give_way();
      break;
    case Schedule::Priority:
      if (g_policy.return_to_scheduler) return give_way();
      break;
  }
  if (m.config.completion == Completion::Early && !m.operations.empty()) give_way();
}

void park(Thread& thread, Waitable& waitable) {
  thread.waiting_on = &waitable;
  thread.next_waiter = waitable.waiters;
  waitable.waiters = &thread;
}

void block_on(Waitable& waitable) {
  park(current_thread(), waitable);
  suspend();
}

void poll_on(Waitable& waitable) {
  Thread& self = current_thread();
  self.polling = true;
  machine().pollers.push_back(&self);
  block_on(waitable);
}

void make_ready(Thread& thread) {
  if (thread.polling) remove_poller(thread);
  thread.waiting_on = nullptr;
  thread.next_waiter = nullptr;
  set_ready(*thread.warp, 1u << thread.lane);
}

void make_lanes_ready(Warp& warp, uint32_t lanes) {
  for (uint32_t rest = lanes; rest != 0; rest &= rest - 1) {
    warp.threads[static_cast<uint32_t>(std::countr_zero(rest))]->waiting_on = nullptr;
  }
  set_ready(warp, lanes);
}

void wake_all(Waitable& waitable) {
  Thread* thread = std::exchange(waitable.waiters, nullptr);
  while (thread != nullptr) {
    Thread* next = thread->next_waiter;
    make_ready(*thread);
    thread = next;
  }
}

void perform_before_release(const Thread& thread) {
  const auto& operations = machine().operations;
  for (size_t i = 0; i < operations.size();) {
    if (operations[i].before_release && operations[i].issuer == &thread) {
      perform_operation(i);
    } else {
      ++i;
    }
  }
}

void engine_push(AsyncOperation operation) {
  Machine& m = machine();
  if (operation.issuer == nullptr) {
    operation.issuer =
        m.current_operation != nullptr ? m.current_operation->issuer : &current_thread();
  }
  if (operation.touches != nullptr) {
    if (operation.touches->state == BlockState::Exited) {
      fail(ErrorKind::Misuse, "%s: block (%u,%u,%u), whose shared memory it touches, has exited",
           operation.what, operation.touches->index.x, operation.touches->index.y,
           operation.touches->index.z);
    }
    ++operation.touches->operations_in_flight;
  }
  ++operation.issuer->block().cluster->operations_in_flight;
  m.operations.push_back(std::move(operation));
  preemption_point();
}

}  // namespace emulator
