// The checker's current thread, plain accesses, and faults on their way to an exception; see
// checker.h.
#include "emulator/race/checker.h"

#include "emulator/counts/counters.h"

namespace emulator::race {

Checker& checker() {
  static Checker instance;
  return instance;
}

ThreadState* Checker::current() {
  static Machine& running = machine();
  return launched && running.current ? &agents.state(*running.current) : nullptr;
}

Actor Checker::actor(const ThreadState& thread, uint8_t flags) const {
  Actor actor;
  actor.id = thread.id;
  actor.epoch = thread.epoch();
  actor.seen = &thread.knowledge.seen;
  actor.performed = &thread.knowledge.performed;
  actor.flags = flags;
  return actor;
}

void Checker::plain_access(const void* memory, size_t bytes, const void* instruction, bool writes,
                           uint8_t flags) {
  const Region* region = shadow.find(memory);
  const ThreadState* thread = region ? current() : nullptr;
  if (!thread) return;
  Actor access = actor(*thread, flags);
  access.instruction = instruction;
  in_callback_ = true;
  if (writes)
    shadow.write(access, memory, bytes);
  else
    shadow.read(access, memory, bytes);
  in_callback_ = false;
  if (region->space == Space::Global)
    count_global(writes ? GlobalAccess::Store : GlobalAccess::Load, bytes);
}

void Checker::check_aligned(const void* memory, size_t bytes, bool writes) {
  if (reinterpret_cast<uintptr_t>(memory) % bytes == 0) return;
  if (shadow.find(memory) == nullptr || current() == nullptr || !raises_faults()) return;
  in_callback_ = true;
  fault(ErrorKind::Misuse, format("a plain %s of %zu bytes at %p, which is no multiple of them",
                                  writes ? "store" : "load", bytes, memory));
  in_callback_ = false;
}

void Checker::fault(ErrorKind kind, const std::string& text) {
  if (in_callback_) {
    kept_kind_ = kind;
    kept_ = text;
    return;
  }
  fail(kind, "%s", text.c_str());
}

void Checker::throw_kept_fault() {
  if (kept_.empty()) return;
  const std::string text = std::move(kept_);
  kept_.clear();
  fail(kept_kind_, "%s", text.c_str());
}

void Checker::begin_launch() {
  launched = true;
  kept_.clear();
  shadow.begin_launch();
  agents.begin_launch();
  sync_objects.begin_launch();
}

void Checker::end_launch() {
  launched = false;
  kept_.clear();
}

}  // namespace emulator::race
