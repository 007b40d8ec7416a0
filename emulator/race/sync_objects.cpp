// Release and acquire on sync objects; see sync_objects.h.
#include "emulator/race/sync_objects.h"

namespace emulator::race {
namespace {

void acquire_clocks(Knowledge& knowledge, SyncClocks& clocks) {
  knowledge.seen.acquire(clocks.seen);
  for (int space = 0; space < 2; ++space) knowledge.proxied[space].acquire(clocks.proxied[space]);
  if (clocks.performed.clock()) knowledge.performed.acquire(clocks.performed);
}

uint32_t place_of(const ThreadState& thread, Scope scope) {
  return scope == Scope::Block ? thread.id.block : scope == Scope::Cluster ? thread.cluster : 0;
}

}  // namespace

void SyncClocks::release(Knowledge& knowledge) {
  seen.release(knowledge.seen);
  for (int space = 0; space < 2; ++space) proxied[space].release(knowledge.proxied[space]);
  if (knowledge.performed.base()) performed.release(knowledge.performed);
}

SyncClocks* SyncObjects::Object::at(Scope scope, uint32_t place, bool create) {
  if (scope == Scope::Gpu) return &clocks;
  for (Scoped& entry : scoped)
    if (entry.scope == scope && entry.place == place) return &entry.clocks;
  if (!create) return nullptr;
  scoped.push_back({scope, place, {}});
  return &scoped.back().clocks;
}

void SyncObjects::release(ThreadState& thread, const void* sync, ReleaseMode mode) {
  Object& object = objects_[sync];
  if (mode == ReleaseMode::Replace) object = Object();
  object.clocks.release(thread.knowledge);
  thread.next_epoch();
}

void SyncObjects::release_fenced(ThreadState& thread, const void* sync, Scope scope) {
  const auto& fenced = thread.fenced[static_cast<int>(scope)];
  if (fenced) objects_[sync].clocks.release(*fenced);
}

void SyncObjects::acquire(ThreadState& thread, const void* sync) {
  const auto object = objects_.find(sync);
  if (object != objects_.end()) acquire_clocks(thread.knowledge, object->second.clocks);
}

void SyncObjects::acquire(OperationState& operation, const void* sync) {
  const auto object = objects_.find(sync);
  if (object != objects_.end()) acquire_clocks(operation.issuer, object->second.clocks);
}

void SyncObjects::acquire_performed(ThreadState& thread, const void* sync) {
  const auto object = objects_.find(sync);
  if (object == objects_.end()) return;
  thread.knowledge.performed.acquire(object->second.clocks.seen);
  thread.knowledge.performed.acquire(object->second.clocks.performed);
}

void SyncObjects::complete(const OperationState& operation, const void* sync) {
  // The completion orders only the operation: what its issuer did before is ordered only by the
  // issuer's own release.
  objects_[sync].clocks.seen.release(operation.id, operation.epoch);
}

void SyncObjects::atomic(ThreadState& thread, const void* address, AtomicAccess access) {
  auto found = objects_.find(address);
  if (access != AtomicAccess::Store && found != objects_.end()) {
    for (int i = 0; i < kScopes; ++i) {
      const Scope scope = static_cast<Scope>(i);
      const SyncClocks* clocks = found->second.at(scope, place_of(thread, scope), false);
      if (!clocks) continue;
      auto& pending = thread.pending[i];
      if (!pending) pending = std::make_unique<ThreadState::Pending>();
      pending->seen = join(pending->seen, clocks->seen.clock());
      for (int space = 0; space < 2; ++space)
        pending->proxied[space] = join(pending->proxied[space], clocks->proxied[space].clock());
    }
  }
  if (access == AtomicAccess::Load) return;
  // A store that is not part of a release sequence ends the one before it (PTX ISA "Release
  // Sequences").
  if (access == AtomicAccess::Store && found != objects_.end()) found->second = Object();
  for (int i = 0; i < kScopes; ++i) {
    if (!thread.fenced[i]) continue;
    const Scope scope = static_cast<Scope>(i);
    objects_[address].at(scope, place_of(thread, scope), true)->release(*thread.fenced[i]);
  }
}

void SyncObjects::fence(ThreadState& thread, Scope scope) {
  const int widest = static_cast<int>(scope);
  for (int i = 0; i <= widest; ++i) {
    if (!thread.pending[i]) continue;
    thread.knowledge.seen.join(thread.pending[i]->seen);
    for (int space = 0; space < 2; ++space)
      thread.knowledge.proxied[space].join(thread.pending[i]->proxied[space]);
    thread.pending[i].reset();
  }
  for (int i = 0; i <= widest; ++i)
    thread.fenced[i] = std::make_unique<Knowledge>(thread.knowledge);
  thread.next_epoch();
}

void SyncObjects::fence_only(ThreadState& thread, const void* sync) {
  const auto object = objects_.find(sync);
  if (object == objects_.end()) return;
  for (int i = 0; i <= static_cast<int>(Scope::Cluster); ++i) {
    auto& fenced = thread.fenced[i];
    if (!fenced) {
      fenced = std::make_unique<Knowledge>();
      for (View* view :
           {&fenced->seen, &fenced->proxied[0], &fenced->proxied[1], &fenced->performed}) {
        view->self = thread.id;
        view->own = 0;
      }
    }
    fenced->seen.acquire(object->second.clocks.seen);
  }
}

}  // namespace emulator::race
