// A copy takes effect at issue (Early), at a later copy (Random), or when it is waited for (Late).
#include "emulator/copies/cp_async.h"

#include <cstring>

#include "emulator/counts/counters.h"
#include "emulator/machine/scheduler.h"
#include "emulator/memory/global_memory.h"
#include "emulator/memory/shared_memory.h"

namespace emulator {
namespace {

constexpr const char* kName = "cp.async";

void perform(PendingCopy& copy) {
  if (copy.performed) return;
  copy.performed = true;
  const bool reads = copy.source_bytes != 0;  // with none, the source may point anywhere
  if (reads) race_async_read(copy.agent, copy.source, copy.source_bytes, kName);
  race_async_write(copy.agent, copy.destination, copy.bytes, kName);
  if (reads) std::memcpy(copy.destination, copy.source, copy.source_bytes);
  std::memset(copy.destination + copy.source_bytes, 0, copy.bytes - copy.source_bytes);
}

// The race checker's agent for the next copy: that of the copy before it, if it is in the same
// group and the thread cannot have synchronised since.
AsyncAgent agent_for_next(CpAsyncState& state) {
  const uint64_t switches = machine().switches;
  const bool same = state.uncommitted != 0 && state.switches == switches;
  state.switches = switches;
  return same ? state.copies.back().agent : race_fork_async(Proxy::Generic);
}

void issue(uint32_t destination, const void* source, uint32_t bytes, uint32_t source_bytes) {
  Machine& m = machine();
  unsigned char* pointer = own_shared(destination, bytes, bytes, kName);
  if (source_bytes > bytes) {
    fail(ErrorKind::Misuse, "cp.async: src-size %u is larger than cp-size %u", source_bytes, bytes);
  }
  if (source_bytes != 0) {
    check_global(source, source_bytes, bytes, kName);
    count_global(GlobalAccess::CpAsync, source_bytes);
  }
  CpAsyncState& state = current_thread().cp_async;
  state.copies.push_back({pointer, source, bytes, source_bytes, agent_for_next(state), false});
  ++state.uncommitted;
  // Until the wait the destination may not be accessed, even if the bytes arrive at once.
  race_in_flight(pointer, bytes, true);
  poison(pointer, bytes);
  switch (m.config.completion) {
    case Completion::Early:
      perform(state.copies.back());
      break;
    case Completion::Late:
      break;
    case Completion::Random:  // any copy in flight may take effect now
      perform(state.copies[m.rng.below(static_cast<uint32_t>(state.copies.size()))]);
      break;
  }
}

}  // namespace

void cp_async_16(uint32_t destination, const void* source, uint32_t source_bytes) {
  issue(destination, source, 16, source_bytes);
}

void cp_async_commit_group() {
  CpAsyncState& state = current_thread().cp_async;
  state.committed_groups.push_back(state.uncommitted);
  state.uncommitted = 0;
}

void cp_async_wait_group(uint32_t groups_left) {
  CpAsyncState& state = current_thread().cp_async;
  if (state.committed_groups.size() <= groups_left) return;
  const size_t groups = state.committed_groups.size() - groups_left;
  size_t count = 0;
  for (size_t i = 0; i < groups; ++i) count += state.committed_groups[i];
  for (size_t i = 0; i < count; ++i) {
    PendingCopy& copy = state.copies[i];
    perform(copy);
    race_in_flight(copy.destination, copy.bytes, false);
    const bool last_of_agent = i + 1 == count || state.copies[i + 1].agent.id != copy.agent.id;
    if (last_of_agent) race_async_complete(copy.agent, &state);
  }
  race_acquire(&state);
  state.copies.erase(state.copies.begin(),
                     state.copies.begin() + static_cast<std::ptrdiff_t>(count));
  state.committed_groups.erase(
      state.committed_groups.begin(),
      state.committed_groups.begin() + static_cast<std::ptrdiff_t>(groups));
  preemption_point();
}

void cp_async_thread_exits(Thread& thread) {
  const CpAsyncState& state = thread.cp_async;
  race_forget(&state);
  if (state.copies.empty()) return;
  fail(ErrorKind::ExitCheck,
       "the thread exits with %zu cp.async not waited for (%u of them not committed)",
       state.copies.size(), state.uncommitted);
}

}  // namespace emulator
