// The hooks of race.h, in terms of the checker: race/clocks.h (vector clocks), race/shadow.h (what
// memory remembers), race/agents.h (threads and asynchronous operations), race/sync_objects.h
// (barriers and flags), race/callbacks.cpp (accesses of kernel code), race/report.h.
//
// What is a race: two accesses of one byte, at least one of which writes, not both atomic, without
// a happens-before order between them. Order comes from program order; barriers, mbarrier phases,
// flags and launches as the layer releases and acquires them; completions of asynchronous
// operations once they are waited for. An operation of the async proxy must, moreover, be ordered
// after a generic write by way of a fence.proxy.async. Two plain writes of the same value race too;
// polling with a relaxed or volatile load does not.
#include "emulator/race/race.h"

#include "emulator/machine/machine.h"
#include "emulator/race/checker.h"
#include "emulator/race/report.h"

namespace emulator {
namespace {

using race::Actor;
using race::checker;
using race::OperationState;
using race::ThreadState;

// The current thread of a launch, after throwing what one of its plain accesses found; null for the
// host and for the scheduler.
ThreadState* entering_thread() {
  checker().throw_kept_fault();
  return checker().current();
}

Actor engine_actor(const ThreadState& thread, uint8_t flags, const char* what) {
  Actor actor = checker().actor(thread, flags);
  actor.site = race::call_site(what);
  return actor;
}

}  // namespace

void race_launch_begin() { checker().begin_launch(); }
void race_launch_end() { checker().end_launch(); }

void race_thread_begin(Thread& thread) { checker().agents.begin_thread(thread); }

void race_thread_end(Thread& thread) {
  checker().throw_kept_fault();
  checker().agents.end_thread(thread);
}

void race_shared_begin(const void* memory, size_t bytes) {
  // The pages around a block's shared memory contain nothing else (shared_memory.cpp).
  constexpr size_t kGuardBytes = 1024;
  if (bytes > 0) checker().shadow.add(memory, bytes, kGuardBytes, Space::Shared, "", false);
}
void race_shared_end(const void* memory, size_t) { checker().shadow.remove(memory); }

void race_global_begin(const void* memory, size_t bytes, size_t guard_bytes, const char* name,
                       bool initialised) {
  if (bytes > 0) checker().shadow.add(memory, bytes, guard_bytes, Space::Global, name, initialised);
}
void race_global_end(const void* memory) { checker().shadow.remove(memory); }
void race_host_write(const void* memory, size_t bytes) {
  checker().shadow.host_wrote(memory, bytes);
}

void race_release(const void* sync, ReleaseMode mode) {
  if (ThreadState* thread = entering_thread()) checker().sync_objects.release(*thread, sync, mode);
}
void race_acquire(const void* sync) {
  if (ThreadState* thread = entering_thread()) checker().sync_objects.acquire(*thread, sync);
}
void race_acquire_performed(const void* sync) {
  if (ThreadState* thread = entering_thread())
    checker().sync_objects.acquire_performed(*thread, sync);
}
void race_release(Thread& thread, const void* sync, ReleaseMode mode) {
  checker().throw_kept_fault();
  checker().sync_objects.release(checker().agents.state(thread), sync, mode);
}
void race_acquire(Thread& thread, const void* sync) {
  checker().throw_kept_fault();
  checker().sync_objects.acquire(checker().agents.state(thread), sync);
}
void race_forget(const void* sync) { checker().sync_objects.forget(sync); }

void race_proxy_fence(Space space) {
  ThreadState* thread = entering_thread();
  if (!thread) return;
  thread->knowledge.proxied[static_cast<int>(space)] = thread->knowledge.seen;
  thread->next_epoch();  // what the thread writes after the fence is not covered by it
}

void race_release_fenced(const void* sync, Scope scope) {
  if (ThreadState* thread = entering_thread())
    checker().sync_objects.release_fenced(*thread, sync, scope);
}

void race_release_finished(const void* sync) {
  ThreadState* thread = entering_thread();
  if (!thread) return;
  checker().agents.for_each_finished_operation(*thread, [&](race::AgentId operation, auto epoch) {
    checker().sync_objects.release_finished(operation, epoch, sync);
  });
}

void race_fence_only(const void* sync) {
  if (ThreadState* thread = entering_thread()) checker().sync_objects.fence_only(*thread, sync);
}

void race_peer_access(const Block& peer, const char* what) {
  if (ThreadState* thread = entering_thread())
    checker().agents.peer_access(*thread, peer, race::call_site(what));
}

void race_fence(Scope scope) {
  if (ThreadState* thread = entering_thread()) checker().sync_objects.fence(*thread, scope);
}

void race_read(const void* pointer, size_t bytes, const char* what) {
  if (ThreadState* thread = entering_thread())
    checker().shadow.read(engine_actor(*thread, 0, what), pointer, bytes);
}

void race_write(const void* pointer, size_t bytes, const char* what) {
  if (ThreadState* thread = entering_thread())
    checker().shadow.write(engine_actor(*thread, 0, what), pointer, bytes);
}

void race_atomic(const void* pointer, size_t bytes, AtomicAccess access, const char* what) {
  ThreadState* thread = entering_thread();
  if (!thread) return;
  const Actor actor = engine_actor(*thread, race::kAtomic, what);
  if (access != AtomicAccess::Store) checker().shadow.read(actor, pointer, bytes);
  if (access != AtomicAccess::Load) checker().shadow.write(actor, pointer, bytes);
  checker().sync_objects.atomic(*thread, pointer, access);
}

AsyncAgent race_fork_async(Proxy proxy) {
  ThreadState* thread = entering_thread();
  if (!thread)
    fail(ErrorKind::Misuse, "race_fork_async: no thread runs; fork where the operation is issued");
  return {checker().agents.fork(*thread, proxy, race::call_site(""))};
}

void race_async_acquire(AsyncAgent agent, const void* sync) {
  checker().sync_objects.acquire(checker().agents.operation(agent.id), sync);
}

void race_async_read(AsyncAgent agent, const void* pointer, size_t bytes, const char* what) {
  checker().shadow.read(checker().agents.actor(agent.id, what), pointer, bytes);
}

void race_async_write(AsyncAgent agent, const void* pointer, size_t bytes, const char* what) {
  checker().shadow.write(checker().agents.actor(agent.id, what), pointer, bytes);
}

void race_async_complete(AsyncAgent agent, const void* sync) {
  OperationState& operation = checker().agents.operation(agent.id);
  checker().sync_objects.complete(operation, sync);
  operation.complete = true;
}

void race_in_flight(const void* pointer, size_t bytes, bool on) {
  // Removing the mark is an action of the operation itself, performed on the scheduler's stack or
  // by any thread.
  ThreadState* thread = checker().current();
  const Actor actor =
      thread && on ? engine_actor(*thread, 0, "issue of an asynchronous operation") : Actor();
  checker().shadow.set_in_flight(actor, pointer, bytes, on);
}

}  // namespace emulator
